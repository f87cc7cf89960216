"""Runs the scan by a GPU kernel, with its gradient: one launch per pass, on each device for its part of the batch.

The kernels scan; XLA sums the directions, gates and scores, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from top_jax.kernels.blocks import Blocks
from top_jax.kernels.operands import ScanArguments, ScanGradients, ScanOutputs, ScanPlan
from top_jax.kernels.pallas_scan import pallas_backward, pallas_forward
from top_jax.kernels.triton_scan import triton_backward, triton_forward
from top_jax.ops.directions import for_each_direction, gated_and_scored, kept_of_a_scan
from top_jax.ops.partition import split_over_batch

_KERNELS: Final = {
    "pallas": (pallas_forward, pallas_backward),
    "pallas_interpret": (
        functools.partial(pallas_forward, interpret=True),
        functools.partial(pallas_backward, interpret=True),
    ),
    "triton": (triton_forward, triton_backward),
}
# The batch axis of each array; None where every device needs the whole array.
_ARGUMENT_AXES: Final = {
    "u": 1, "delta": 1, "A": None, "B": 1, "C": 1, "D": None, "delta_bias": None, "gap": 1, "order": 1,
}  # fmt: skip
_GRADIENT_AXES: Final = ScanGradients(u=1, delta=1, A=1, B=2, C=2, D=1, delta_bias=1)


def kernel_arguments(arguments: ScanArguments, directions: int) -> ScanArguments:
    """Converts arguments for the kernels: `for_each_direction`, and zeros for an absent D or delta_bias."""
    zeros = jnp.zeros((1, arguments.A.shape[1]))
    return for_each_direction(
        arguments._replace(
            D=zeros if arguments.D is None else arguments.D,
            delta_bias=zeros if arguments.delta_bias is None else arguments.delta_bias,
        ),
        directions,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_scan(implementation: str, plan: ScanPlan, blocks: Blocks, arguments: ScanArguments, z: Any) -> Any:
    """Scans in all directions of `plan` in one launch, sums, gates and scores.

    Each direction's y is rounded to u's dtype before the float32 sum.

    Args:
        implementation: `pallas`, `pallas_interpret` or `triton`.
        plan: directions and score.
        blocks: block sizes of the kernels.
        arguments: as `kernel_arguments` returns them.
        z: `[B, L, E]` gate of the sum over directions, before SiLU, or None.

    Returns:
        out `[B, L, E]` in u's dtype, and float32 `[B, L]` sums over the channels' `TOKEN_WORTH` (None without a
        score), which carry no gradient.
    """
    total = _sum(_forward(implementation, plan, blocks, arguments, save=False).y)
    return gated_and_scored(total, z, plan, arguments.u.dtype)


def _fused_forward(implementation: str, plan: ScanPlan, blocks: Blocks, arguments: ScanArguments, z: Any):
    outputs = _forward(implementation, plan, blocks, arguments, save=True)
    total = _sum(outputs.y)
    kept = None if z is None else total.astype(arguments.u.dtype)  # autodiff would keep float32: twice the bytes
    out, score = gated_and_scored(total, z, plan, arguments.u.dtype)
    return (kept_of_a_scan(out), score), (arguments, z, kept_of_a_scan(outputs.starts), kept_of_a_scan(kept))


def _fused_backward(
    implementation: str,
    plan: ScanPlan,
    blocks: Blocks,
    saved: tuple[ScanArguments, Any, jax.Array, jax.Array | None],
    cotangents: tuple[jax.Array, jax.Array | None],
) -> tuple[Any, Any]:
    arguments, z, starts, total = saved
    dout, dz = cotangents[0], None
    if total is not None:
        gate = lambda total, z: gated_and_scored(total, z, plan, jnp.float32)[0]  # noqa: E731
        _, pull_back = jax.vjp(gate, total.astype(jnp.float32), z)
        dout, dz = pull_back(dout.astype(jnp.float32))
    backward = _KERNELS[implementation][1]
    partial = _split_over_batch(
        lambda arguments, starts, dout: backward(arguments, starts, dout, plan, blocks),
        (arguments, starts, dout.astype(arguments.u.dtype)),
        in_axes=(*_ARGUMENT_AXES.values(), 1, 0),
        out_axes=_GRADIENT_AXES,
    )
    # The parts of several programs, images or directions are summed here, in a fixed order: two runs are bit-equal.
    gradients = ScanArguments(
        u=_over_directions(partial.u, arguments.u),
        delta=_over_directions(partial.delta, arguments.delta),
        A=jnp.sum(partial.A, axis=1),
        B=jnp.sum(partial.B, axis=0),
        C=jnp.sum(partial.C, axis=0),
        D=jnp.sum(partial.D, axis=1),
        delta_bias=jnp.sum(partial.delta_bias, axis=1),
        gap=None if arguments.gap is None else jnp.zeros_like(arguments.gap),  # computed from integers: no gradient
        order=None,
    )
    return gradients, dz


fused_scan.defvjp(_fused_forward, _fused_backward)


def _forward(
    implementation: str, plan: ScanPlan, blocks: Blocks, arguments: ScanArguments, *, save: bool
) -> ScanOutputs:
    forward = _KERNELS[implementation][0]
    return _split_over_batch(
        lambda arguments: forward(arguments, plan, blocks, save=save),
        (arguments,),
        in_axes=tuple(_ARGUMENT_AXES.values()),
        out_axes=ScanOutputs(y=1, starts=1 if save else None),
    )


def _sum(y: jax.Array) -> jax.Array:
    return jnp.sum(y, axis=0, dtype=jnp.float32)


def _split_over_batch(
    function: Callable[..., Any], arguments: tuple[Any, ...], *, in_axes: tuple[int | None, ...], out_axes: Any
) -> Any:
    """Applies `split_over_batch` to named tuples with optional arrays; `in_axes` names an axis for each leaf."""
    arrays, tree = jax.tree.flatten(arguments)
    given = [leaf is not None for leaf in jax.tree.leaves(arguments, is_leaf=lambda leaf: leaf is None)]
    run = split_over_batch(
        lambda *arrays: tuple(jax.tree.leaves(function(*tree.unflatten(arrays)))),
        in_axes=tuple(axis for axis, here in zip(in_axes, given, strict=True) if here),
        out_axes=tuple(jax.tree.leaves(out_axes)),
    )
    return jax.tree.unflatten(jax.tree.structure(out_axes), run(*arrays))


def _over_directions(gradient: jax.Array, argument: jax.Array) -> jax.Array:
    """Returns `[G, B, L, E]` unchanged, or summed in float32 if all directions share the argument."""
    if gradient.shape == argument.shape:
        return gradient
    return jnp.sum(gradient, axis=0, keepdims=True, dtype=jnp.float32).astype(argument.dtype)
