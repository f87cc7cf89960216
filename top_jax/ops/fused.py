"""The kernels' scan with its gradient: one launch forward, one back, on every device its share of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from top_jax.kernels.blocks import (
    Blocks,
    choose,
)
from top_jax.kernels.operands import (
    ScanGradients,
    ScanOperands,
    ScanOutputs,
    ScanPlan,
)
from top_jax.kernels.pallas_scan import pallas_backward, pallas_forward
from top_jax.kernels.triton_scan import triton_backward, triton_forward
from top_jax.ops.implementations import device_kind
from top_jax.ops.partition import split_over_batch
from top_jax.typing import Inner, PerChannel, PerToken, Selective, StateMatrix

_PASSES: Final = {
    "pallas": (pallas_forward, pallas_backward),
    "pallas_interpret": (
        functools.partial(pallas_forward, interpret=True),
        functools.partial(pallas_backward, interpret=True),
    ),
    "triton": (triton_forward, triton_backward),
}
# Where each array has its batch axis.
_OPERANDS: Final = ScanOperands(u=1, delta=1, A=None, B=1, C=1, D=None, delta_bias=None, z=0, gap=1, order=1)
_GRADIENTS: Final = ScanGradients(u=1, delta=1, A=1, B=2, C=2, D=1, delta_bias=1, z=0)


def selective_scan_fused(
    implementation: str,
    u: Inner,
    delta: Inner,
    A: StateMatrix,
    B: Selective,
    C: Selective,
    D: PerChannel | None,
    z: Inner | None,
    delta_bias: PerChannel | None,
    gap: PerToken | None,
    reverse: bool,
) -> Inner:
    """Same arguments, after the first, and result as `selective_scan_reference`, by a kernel."""
    one = lambda array: None if array is None else array[None]  # noqa: E731
    operands = make_operands(one(u), one(delta), one(A), one(B), one(C), one(D), z, one(delta_bias), one(gap), None, 1)
    blocks = default_blocks(implementation, *A.shape)
    y, _ = fused_scan(implementation, ScanPlan((reverse,)), blocks, operands)
    return y


def make_operands(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, gap: Any, order: Any, directions: int
) -> ScanOperands:
    """Operands as the kernels want them, of arrays whose first axis is 1 or `directions`.

    The small ones become float32, and one for each direction: B and C are few of the bytes, but converting them in
    the kernel would be many of its instructions.
    """

    def for_each(array: jax.Array | None, dtype: Any = jnp.float32) -> jax.Array:
        array = jnp.zeros((1, A.shape[1])) if array is None else array
        return jnp.broadcast_to(array.astype(dtype), (directions, *array.shape[1:]))

    return ScanOperands(
        u=u,
        delta=delta,
        A=for_each(A),
        B=for_each(B),
        C=for_each(C),
        D=for_each(D),
        delta_bias=for_each(delta_bias),
        z=z,
        gap=None if gap is None else for_each(gap),
        order=None if order is None else for_each(order, jnp.int32),
    )


def default_blocks(implementation: str, width: int, states: int) -> Blocks:
    """Block sizes from this device's tuning table, else by rule."""
    return choose(implementation.removesuffix("_interpret"), device_kind(), width, states)[0]


def fused_scan(
    implementation: str, plan: ScanPlan, blocks: Blocks, operands: ScanOperands
) -> tuple[jax.Array, jax.Array | None]:
    """Scans in all directions of `plan`, sums, gates and scores.

    Args:
        implementation: `pallas`, `pallas_interpret` or `triton`.
        plan: directions and score.
        blocks: how the kernels cut up the work.
        operands: see `ScanOperands`.

    Returns:
        out `[B, L, E]` in u's dtype, and float32 `[B, L]` sums over channels of what the score adds up (None without
        a score), which carry no gradient.
    """
    return _fused(implementation, plan, blocks, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(implementation: str, plan: ScanPlan, blocks: Blocks, operands: ScanOperands) -> Any:
    outputs = _forward(implementation, plan, blocks, operands, save=False)
    return outputs.out, _whole_score(outputs)


def _fused_forward(implementation: str, plan: ScanPlan, blocks: Blocks, operands: ScanOperands):
    outputs = _forward(implementation, plan, blocks, operands, save=True)
    return (outputs.out, _whole_score(outputs)), (operands, outputs.starts)


def _fused_backward(
    implementation: str,
    plan: ScanPlan,
    blocks: Blocks,
    saved: tuple[ScanOperands, jax.Array],
    cotangents: tuple[jax.Array, jax.Array | None],
) -> tuple[ScanOperands]:
    operands, starts = saved
    backward = _PASSES[implementation][1]
    partial = _split_over_batch(
        lambda operands, starts, dout: backward(operands, starts, dout, plan, blocks),
        (operands, starts, cotangents[0]),
        in_axes=(_OPERANDS, 1, 0),
        out_axes=_GRADIENTS._replace(z=None if operands.z is None else 0),
    )
    # What several programs, images or directions add to is summed here, in a fixed order: two runs are bit-equal.
    return (
        ScanOperands(
            u=_over_directions(partial.u, operands.u),
            delta=_over_directions(partial.delta, operands.delta),
            A=jnp.sum(partial.A, axis=1),
            B=jnp.sum(partial.B, axis=0),
            C=jnp.sum(partial.C, axis=0),
            D=jnp.sum(partial.D, axis=1),
            delta_bias=jnp.sum(partial.delta_bias, axis=1),
            z=partial.z,
            gap=None if operands.gap is None else jnp.zeros_like(operands.gap),  # made of integers
            order=None,
        ),
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _forward(implementation: str, plan: ScanPlan, blocks: Blocks, operands: ScanOperands, *, save: bool) -> ScanOutputs:
    forward = _PASSES[implementation][0]
    return _split_over_batch(
        lambda operands: forward(operands, plan, blocks, save=save),
        (operands,),
        in_axes=(_OPERANDS,),
        out_axes=ScanOutputs(out=0, score=1 if plan.score else None, starts=1 if save else None),
    )


def _split_over_batch(function: Callable[..., Any], arguments: Any, *, in_axes: Any, out_axes: Any) -> Any:
    """`split_over_batch` of a function of named tuples in which arrays may be missing."""
    arrays, tree = jax.tree.flatten(arguments)
    absent = lambda leaf: leaf is None  # noqa: E731
    axes = jax.tree.leaves(in_axes, is_leaf=absent)
    given = [leaf is not None for leaf in jax.tree.leaves(arguments, is_leaf=absent)]
    run = split_over_batch(
        lambda *arrays: tuple(jax.tree.leaves(function(*tree.unflatten(arrays)))),
        in_axes=tuple(axis for axis, here in zip(axes, given, strict=True) if here),
        out_axes=tuple(jax.tree.leaves(out_axes)),
    )
    return jax.tree.unflatten(jax.tree.structure(out_axes), run(*arrays))


def _whole_score(outputs: ScanOutputs) -> jax.Array | None:
    return None if outputs.score is None else jnp.sum(outputs.score, axis=0)


def _over_directions(gradient: jax.Array, operand: jax.Array) -> jax.Array:
    """`[G, B, L, E]` as it is, or summed (in float32) where all directions share the operand."""
    if gradient.shape == operand.shape:
        return gradient
    return jnp.sum(gradient, axis=0, keepdims=True, dtype=jnp.float32).astype(operand.dtype)
