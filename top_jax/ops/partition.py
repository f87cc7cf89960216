"""Runs functions that XLA cannot partition (kernels) on each device's part of the batch.

By default, a jitted program over a mesh gathers the whole batch on every device before such a function. `shard_map`
needs the mesh and the batch's mesh axes during tracing, when plain `jax.jit` does not know them yet. The callbacks of
`custom_partitioning` run in the compiler, where both are known.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    use_abstract_mesh,
)

InAxes = tuple[int | None, ...]
OutAxes = int | tuple[int, ...]


def split_over_batch(function: Callable[..., Any], *, in_axes: InAxes, out_axes: OutAxes) -> Callable[..., Any]:
    """Splits `function` over the batch under `jax.jit` on any mesh, whichever mesh axes split the batch.

    Each device calls it on its own images, so it is traced once more, for one device's part of the batch. Where images
    do not split evenly that part is rounded up, and the padding is discarded. An argument split along another axis is
    gathered along it. On one device, and inside `jax.shard_map` over all mesh axes, `function` itself is compiled.

    Under `jax.vmap` the mapped axis becomes part of the batch, so `function` needs no batching rule. If an argument
    without a batch is mapped, the call becomes a loop. The result has no derivative: call it in the rules of a
    `jax.custom_vjp`.

    JAX limits programs that contain it on several devices: all their shardings must be on one mesh, the persistent
    compilation cache never finds them again, and `jax.export` rejects them.

    Args:
        function: takes arrays, and returns an array or a tuple of arrays, each with a batch. Images must not influence
            each other. It may close over Python values, not over arrays.
        in_axes: the batch axis of each argument; None if it has no batch, so that every device gets all of it.
        out_axes: the batch axis of the result, or of each result.

    Returns:
        A function of the same positional arguments and the same results.
    """
    split = custom_partitioning(function)

    def shardings(mesh: Mesh, arguments: Sequence[jax.ShapeDtypeStruct]) -> tuple[Mesh, Any, tuple[NamedSharding, ...]]:
        mesh, batch = _mesh_and_batch(mesh, arguments, in_axes)
        place = lambda axis: NamedSharding(mesh, _spec(axis, batch))  # noqa: E731
        return mesh, jax.tree.map(place, out_axes), tuple(map(place, in_axes))

    def partition(mesh: Mesh, arguments: Sequence[jax.ShapeDtypeStruct], _results: Any):
        mesh, of_results, of_arguments = shardings(mesh, arguments)
        return mesh, _without_mesh(function), of_results, of_arguments

    split.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, arguments, _: shardings(mesh, arguments)[1],
        sharding_rule=lambda _, arguments, results: _rule(arguments, results, in_axes, jax.tree.leaves(out_axes)),
    )
    return _with_batching(_with_explicit_axes(split, in_axes, out_axes), in_axes, out_axes)


def _without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `function` on the arrays of one device, outside the mesh of the caller's `jax.set_mesh`."""

    def call(*arguments: jax.Array) -> Any:
        with use_abstract_mesh(AbstractMesh((), ())):
            return function(*arguments)

    return call


def _mesh_and_batch(mesh: Mesh, arguments: Sequence[jax.ShapeDtypeStruct], in_axes: InAxes) -> tuple[Mesh, Any]:
    """Returns the mesh, and the mesh axes that split the batch."""
    if mesh.empty:
        # Inside a shard_map over some mesh axes JAX does not name the others, so those devices repeat the work.
        devices = sorted(arguments[0].sharding.device_set, key=lambda device: device.id)
        return Mesh(np.array(devices), ("all",)), None
    return mesh, _batch_of([argument.sharding for argument in arguments], in_axes)


def _batch_of(shardings: Sequence[Any], in_axes: InAxes) -> Any:
    """Returns the mesh axes that split the batch, from the first argument that is split; None if none is."""
    specs = (sharding.spec[axis] for sharding, axis in zip(shardings, in_axes, strict=True) if axis is not None)
    return next((spec for spec in specs if spec is not None), None)


def _spec(axis: int | None, mesh_axes: Any) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh_axes)


def _rule(
    arguments: Sequence[Any], results: Sequence[Any], in_axes: InAxes, out_axes: Sequence[int]
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Shardy's rule: the batch is one factor everywhere; every other axis is its own factor and must not be split."""
    names = (f"w{number}" for number in itertools.count())
    factors = [
        ["batch" if axis == batch else next(names) for axis in range(array.rank)]
        for array, batch in zip((*arguments, *results), (*in_axes, *out_axes), strict=True)
    ]
    sides = (factors[: len(arguments)], factors[len(arguments) :])
    rule = " -> ".join(", ".join(" ".join(array) for array in side) for side in sides)
    whole = tuple(factor for array in factors for factor in array if factor != "batch")
    return rule, {"need_replication_factors": whole}


def _with_explicit_axes(split: Callable[..., Any], in_axes: InAxes, out_axes: OutAxes) -> Callable[..., Any]:
    """Wraps `split` for `AxisType.Explicit` meshes, where shardings are part of types that kernels do not handle."""

    def call(*arguments: jax.Array) -> Any:
        shardings = [jax.typeof(argument).sharding for argument in arguments]
        mesh = next((s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types), None)
        if mesh is None:
            return split(*arguments)
        batch = _batch_of(shardings, in_axes)
        of_results = jax.tree.map(lambda axis: NamedSharding(mesh, _spec(axis, batch)), out_axes)
        return auto_axes(split, out_sharding=of_results)(*arguments)

    return call


def _with_batching(split: Callable[..., Any], in_axes: InAxes, out_axes: OutAxes) -> Callable[..., Any]:
    """Adds a rule for `jax.vmap` to `split`, which custom_partitioning lacks."""
    batched = custom_vmap(split)

    @batched.def_vmap
    def rule(size: int, mapped: Sequence[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        if any(is_mapped and axis is None for is_mapped, axis in zip(mapped, in_axes, strict=True)):
            results = _loop(batched, mapped, arguments)
        else:
            folded = map(functools.partial(_fold, size=size), arguments, mapped, in_axes)
            results = jax.tree.map(functools.partial(_unfold, size=size), batched(*folded), out_axes)
        return results, jax.tree.map(lambda _: True, out_axes)

    return batched


def _loop(function: Callable[..., Any], mapped: Sequence[bool], arguments: Sequence[jax.Array]) -> Any:
    """Calls `function` on every entry of the mapped arguments, one after the other."""

    def one(entries: list[jax.Array]) -> Any:
        rest = iter(entries)
        return function(*(next(rest) if is_mapped else a for a, is_mapped in zip(arguments, mapped, strict=True)))

    return jax.lax.map(one, [a for a, is_mapped in zip(arguments, mapped, strict=True) if is_mapped])


def _fold(argument: jax.Array, is_mapped: bool, axis: int | None, *, size: int) -> jax.Array:
    """Reshapes `[V, .., B, ..]`, or an unmapped argument, to `[.., B V, ..]`: B is first, so its split stays valid."""
    if axis is None:
        return argument
    if not is_mapped:
        return jnp.repeat(argument, size, axis=axis)
    moved = jnp.moveaxis(argument, 0, axis + 1)
    return moved.reshape(*argument.shape[1 : axis + 1], argument.shape[axis + 1] * size, *argument.shape[axis + 2 :])


def _unfold(result: jax.Array, axis: int, *, size: int) -> jax.Array:
    """Reshapes `[.., B V, ..]` to `[V, .., B, ..]`: the inverse of `_fold`."""
    split = result.reshape(*result.shape[:axis], result.shape[axis] // size, size, *result.shape[axis + 1 :])
    return jnp.moveaxis(split, axis + 1, 0)
