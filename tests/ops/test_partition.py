"""A jitted program on a mesh leaves every image on its device: the op, its kernels, the selection, a whole model.

This file is also the program that is started on eight devices, where it runs `CHECKS`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import traffic
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import top_jax
from top_jax.models import to_grid
from top_jax.ops.partition import split_over_batch
from top_jax.pruning import Cut, Evit, Merging, Pruning, Tokens

IMPLEMENTATIONS = ("xla", "pallas_interpret")  # of the scan, on its own and in a model
LENGTH, BATCH, WIDTH, STATES = 5, 16, 6, 4
DEVICES = 8


def draw(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(shape).normal(size=shape).astype(np.float32))


def launch(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A kernel per image: x `[L, B, E]` times scale `[E]`, and its sum over L, `[B, E]`."""

    def kernel(x_ref: Any, scale_ref: Any, y_ref: Any, sum_ref: Any) -> None:
        y_ref[...] = x_ref[...] * scale_ref[...][None, None, :]
        sum_ref[...] = jnp.sum(y_ref[...], axis=0)

    length, batch, width = x.shape
    image = pl.BlockSpec((length, 1, width), lambda b: (0, b, 0))
    out_shape = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((batch, width), x.dtype))
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(batch,),
        in_specs=[image, pl.BlockSpec((width,), lambda _: (0,))],
        out_specs=(image, pl.BlockSpec((1, width), lambda b: (b, 0))),
        interpret=True,
    )(x, scale)


split_launch = split_over_batch(launch, in_axes=(1, None), out_axes=(1, 0))


@jax.custom_vjp
def product(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale, whose backward launches kernels too; the sums of its images are added up outside them."""
    return split_launch(x, scale)[0]


def product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    _, dscale = split_launch(x * dy, jnp.ones_like(scale))
    return split_launch(dy, scale)[0], jnp.sum(dscale, axis=0)


product.defvjp(lambda x, scale: (product(x, scale), (x, scale)), product_backward)


def gradients(product: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda x, scale: jnp.sum(jnp.sin(product(x, scale))), argnums=(0, 1))


def plain_product(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale[None, None, :]


def assert_close(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(np.asarray(mine), theirs, rtol=1e-4, atol=1e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("axes", [(0, None), (2, None), (0, 0), (None, 1)])
def test_vmap(axes):
    """The mapped axis joins the batch, whether or not every argument has one; a mapped weight makes a loop."""
    mapped = [np.asarray(draw(3, LENGTH, BATCH, WIDTH)), np.asarray(draw(3, WIDTH))]
    arguments = [a[0] if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip(mapped, axes, strict=True)]
    want = jax.vmap(lambda x, scale: (plain_product(x, scale), jnp.sum(plain_product(x, scale), 0)), axes)
    assert_close(jax.jit(jax.vmap(split_launch, axes))(*arguments), jax.jit(want)(*arguments))
    loops = str(jax.make_jaxpr(jax.vmap(split_launch, axes))(*arguments)).count("scan[")
    assert loops == (axes[1] is not None)


def test_vmap_of_one_of_two_batches():
    add = split_over_batch(lambda x, y: x[None, :] + y, in_axes=(0, 1), out_axes=1)
    x, y = draw(3, BATCH), draw(2, 1, BATCH)
    want = np.asarray(x)[None, :, None, :] + np.asarray(y)[:, None]
    assert_close(jax.jit(jax.vmap(jax.vmap(add, (0, None)), (None, 0)))(x, y), want)


@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.jit])
def test_gradients(around):
    x, scale = draw(LENGTH, BATCH, WIDTH), draw(WIDTH)
    many = draw(2, LENGTH, BATCH, WIDTH)

    def run(product, x, many, scale):
        one = gradients(product)
        return one(x, scale), jax.vmap(one, (0, None))(many, scale)

    # Operation by operation it would be fifty programs.
    got, want = (jax.jit(run, static_argnums=0)(f, x, many, scale) for f in (around(product), plain_product))
    assert_close(got, want)


def test_one_device_compiles_the_function_itself():
    """Also what is exported, for a batch of any size."""
    x, scale = draw(LENGTH, BATCH, WIDTH), draw(WIDTH)
    (batch,) = jax.export.symbolic_shape("batch")
    any_x = jax.ShapeDtypeStruct((LENGTH, batch, WIDTH), x.dtype)
    exported = jax.export.export(jax.jit(split_launch))(any_x, scale)
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    assert_close(exported.call(x, scale), launch(x, scale))
    assert jax.eval_shape(split_launch, x, scale) == jax.eval_shape(launch, x, scale)


@pytest.mark.parametrize(
    "checks", ["kernel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("parts", "model"))]
)
def test_eight_devices(root, checks):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{root}/tests/support",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, "-W", "error", __file__, checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [run.__name__ for run in CHECKS[checks]]


# What follows runs on eight devices, in the process that test_eight_devices starts.


@functools.cache
def mesh(*shape: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    names = ("data", "more")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def on_mesh(tree: Any, *spec: Any, over: jax.sharding.Mesh | None = None) -> Any:
    return jax.device_put(tree, NamedSharding(over or mesh(DEVICES), P(*spec)))


def check_program(function: Callable[..., Any], arguments: Any, split: Any, *, reduced: int = 0) -> None:
    """The program for `split` moves nothing but sums of `reduced` elements, and gives what one device gives.

    Args:
        function: what is jitted.
        arguments: on one device.
        split: the same, on a mesh.
        reduced: elements of the gradients of weights, which have to be summed over the devices; 0 allows no traffic.
    """
    program = jax.jit(function).lower(*split).compile()
    moved = traffic(program)
    assert {name for name, _ in moved} == ({"all-reduce"} if reduced else set()), moved
    assert sum(elements for _, elements in moved) <= reduced, moved
    assert_close(program(*split), jax.jit(function)(*arguments))


def check_the_control() -> None:
    """Without help these gather, so the checks below can fail."""
    x, scale = on_mesh(draw(LENGTH, BATCH, WIDTH), None, "data"), on_mesh(draw(WIDTH))
    scores = on_mesh(draw(BATCH, LENGTH), "data")
    for program in (jax.jit(launch).lower(x, scale), jax.jit(lambda s: jax.lax.top_k(s, 3)).lower(scores)):
        assert {name for name, _ in traffic(program.compile())} == {"all-gather"}


def check_a_kernel() -> None:
    x, scale = draw(LENGTH, BATCH, WIDTH), draw(WIDTH)
    split = on_mesh(x, None, "data"), on_mesh(scale)
    check_program(split_launch, (x, scale), split)
    check_program(gradients(jax.checkpoint(product)), (x, scale), split, reduced=WIDTH)
    for batch in (("data", "more"), "more"):
        split = on_mesh(x, None, batch, over=mesh(4, 2)), on_mesh(scale, over=mesh(4, 2))
        check_program(split_launch, (x, scale), split)
    many = draw(3, LENGTH, BATCH, WIDTH)
    split = on_mesh(many, None, None, "data"), on_mesh(scale)
    check_program(jax.vmap(split_launch, (0, None)), (many, scale), split)


def check_other_ways_to_split() -> None:
    """Explicit axes, with and without their mesh around the call, and shard_map over all axes or some."""
    x, scale = draw(LENGTH, BATCH, WIDTH), draw(WIDTH)
    explicit = mesh(8, kind=AxisType.Explicit)
    split = on_mesh(x, None, "data", over=explicit), on_mesh(scale, over=explicit)
    check_program(split_launch, (x, scale), split)
    with jax.set_mesh(explicit):
        check_program(split_launch, split, split)
    for axes in (("data", "more"), ("data",)):
        manual = jax.shard_map(
            split_launch,
            mesh=mesh(4, 2),
            in_specs=(P(None, axes), P()),
            out_specs=(P(None, axes), P(axes)),
            axis_names=set(axes),
            check_vma=False,  # which pallas_call does not support
        )
        split = on_mesh(x, None, axes, over=mesh(4, 2)), on_mesh(scale, over=mesh(4, 2))
        program = jax.jit(manual).lower(*split).compile()
        assert traffic(program) == []
        assert_close(program(*split), launch(x, scale))


def check_what_does_not_split_evenly() -> None:
    """Twelve images on eight devices; channels that lie on several devices."""
    x, scale = draw(LENGTH, 12, WIDTH), draw(WIDTH)

    def run(x: jax.Array, scale: jax.Array) -> Any:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh(8), P(None, "data")))
        y, sums = split_launch(x, scale)
        return y, jnp.sum(sums, axis=0)

    got = jax.jit(run, out_shardings=NamedSharding(mesh(8), P()))(on_mesh(x), on_mesh(scale))
    assert_close(got, (launch(x, scale)[0], jnp.sum(launch(x, scale)[1], axis=0)))
    x = draw(LENGTH, BATCH, WIDTH)
    split = on_mesh(x, None, "data", "more", over=mesh(4, 2)), on_mesh(scale, "more", over=mesh(4, 2))
    assert_close(jax.jit(split_launch)(*split), launch(x, scale))


def check_the_scan() -> None:
    images = {name: draw(BATCH, LENGTH, WIDTH) for name in ("u", "delta", "z")}
    images |= {name: draw(BATCH, LENGTH, STATES) for name in ("B", "C")}
    weights = {"A": -jnp.exp(draw(WIDTH, STATES)), "D": draw(WIDTH), "delta_bias": draw(WIDTH)}
    positions = jnp.cumsum(jnp.arange(1, 1 + BATCH * LENGTH, dtype=jnp.int32).reshape(BATCH, LENGTH) % 3 + 1, axis=1)
    split = on_mesh(images, "data"), on_mesh(weights), on_mesh(positions, "data")
    reduced = sum(weight.size for weight in weights.values())
    for implementation in IMPLEMENTATIONS:

        def scan(images: Any, weights: Any, positions: Any, implementation: str = implementation) -> jax.Array:
            options = {"positions": positions, "alignment": "decay", "implementation": implementation}
            return top_jax.ops.selective_scan(**images, **weights, **options)

        graded = jax.grad(lambda *arguments, scan=scan: jnp.sum(jnp.square(scan(*arguments))), argnums=(0, 1))
        check_program(scan, (images, weights, positions), split)
        check_program(graded, (images, weights, positions), split, reduced=reduced)


def check_the_scan_where_axes_are_manual_or_explicit() -> None:
    """JAX's defaults: shard_map that checks what varies, and a mesh of explicit axes around the call."""
    images = {name: draw(BATCH, LENGTH, WIDTH) for name in ("u", "delta", "z")}
    images |= {name: draw(BATCH, LENGTH, STATES) for name in ("B", "C")}
    weights = {"A": -jnp.exp(draw(WIDTH, STATES)), "D": draw(WIDTH), "delta_bias": draw(WIDTH)}

    def loss(images: Any, weights: Any, implementation: str) -> jax.Array:
        y = top_jax.ops.selective_scan(**images, **weights, reverse=True, implementation=implementation)
        return jnp.sum(jnp.square(y))

    for implementation in ("reference", "xla"):
        graded = jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1))
        want = jax.jit(graded)(images, weights)
        shared = jax.grad(
            lambda *a, name=implementation: jax.lax.psum(loss(*a, name), "data"),
            argnums=(0, 1),
        )
        specs = (P("data"), P())
        manual = jax.shard_map(shared, mesh=mesh(DEVICES), in_specs=specs, out_specs=specs)
        assert_close(jax.jit(manual)(on_mesh(images, "data"), on_mesh(weights)), want)
        explicit = mesh(DEVICES, kind=AxisType.Explicit)
        with jax.set_mesh(explicit):
            split = on_mesh(images, "data", over=explicit), on_mesh(weights, over=explicit)
            assert_close(jax.jit(graded)(*split), want)


def draw_tokens(length: int) -> Tokens:
    return Tokens(
        x=draw(BATCH, length, WIDTH),
        residual=draw(2, BATCH, length, WIDTH)[1],
        positions=jnp.tile(jnp.arange(length, dtype=jnp.int32)[None, :], (BATCH, 1)),
        cls_index=jnp.arange(BATCH, dtype=jnp.int32) % length,
    )


def check_the_selection() -> None:
    length = 9
    tokens = draw_tokens(length)
    arguments = tokens, {"clip": draw(BATCH, length)}

    def select(settings: dict[str, str], tokens: Tokens, evidence: Any) -> Tokens:
        pruning = Pruning(after_blocks=(1,), keep_ratio=0.5, **settings)
        return pruning(tokens, evidence, Cut(block=1, before=8, kept=4, after=4))

    for settings in ({"alignment": "hold"}, {"alignment": "none", "order": "score"}, {"score": "random"}):
        check_program(functools.partial(select, settings), arguments, on_mesh(arguments, "data"))

    def loss(x: jax.Array, tokens: Tokens, evidence: Any) -> jax.Array:
        return jnp.sum(jnp.square(select({}, dataclasses.replace(tokens, x=x), evidence).x))

    arguments = tokens.x, *arguments
    check_program(jax.grad(loss), arguments, on_mesh(arguments, "data"))


def check_the_merging() -> None:
    tokens = draw_tokens(10)

    def merge(alignment: str, tokens: Tokens) -> Tokens:
        merging = Merging(after_blocks=(1,), keep_ratio=0.5, alignment=alignment)
        return merging(merging(tokens, {}, Cut(1, 9, 7, 7)), {}, Cut(1, 7, 4, 4))

    for alignment in ("none", "hold"):
        check_program(functools.partial(merge, alignment), (tokens,), on_mesh((tokens,), "data"))

    def loss(x: jax.Array, tokens: Tokens) -> jax.Array:
        merged = merge("hold", dataclasses.replace(tokens, x=x, residual=x))
        return jnp.sum(jnp.square(merged.x)) + jnp.sum(jnp.sin(merged.residual))

    arguments = tokens.x, tokens
    check_program(jax.grad(loss), arguments, on_mesh(arguments, "data"))


def check_a_model() -> None:
    pruning = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="decay")
    merging = Merging(after_blocks=(1,), keep_ratio=0.5, alignment="decay")
    vim, images = dict(d_state=STATES), draw(BATCH, 32, 32, 3)
    cases = [
        *(("vim_tiny", pruning, dict(vim, implementation=name)) for name in IMPLEMENTATIONS),
        ("vim_tiny", merging, vim),
        ("plain_mamba_l1", pruning, vim),
        ("deit_tiny", Evit(after_blocks=(1,), keep_ratio=0.5), dict(num_heads=2)),
    ]
    for name, reduction, sizes in cases:
        size = dict(img_size=32, patch_size=8, depth=2, embed_dim=32, num_classes=5, **sizes)
        model = top_jax.create_model(name, **size, pruning=reduction, rngs=nnx.Rngs(0))
        graphdef, weights = nnx.split(model)

        def run(weights: Any, images: jax.Array, graphdef: Any = graphdef) -> jax.Array:
            return nnx.merge(graphdef, weights)(images)

        graded = jax.grad(lambda *arguments, run=run: jnp.mean(jnp.square(run(*arguments))))
        split = on_mesh(weights), on_mesh(images, "data")
        check_program(run, (weights, images), split)
        check_program(graded, (weights, images), split, reduced=sum(leaf.size for leaf in jax.tree.leaves(weights)))

    def maps(weights: Any, images: jax.Array, graphdef: Any = graphdef) -> list[jax.Array]:
        features = nnx.merge(graphdef, weights).features(images)
        return [to_grid(features, fill) for fill in ("zero", "nearest", "carry")]

    check_program(maps, (weights, images), split)


CHECKS = {
    "kernel": (check_the_control, check_a_kernel),
    "parts": (
        check_other_ways_to_split,
        check_what_does_not_split_evenly,
        check_the_scan,
        check_the_scan_where_axes_are_manual_or_explicit,
        check_the_selection,
        check_the_merging,
    ),
    "model": (check_a_model,),
}

if __name__ == "__main__":
    for run in CHECKS[sys.argv[1]]:
        run()
        print(run.__name__)
