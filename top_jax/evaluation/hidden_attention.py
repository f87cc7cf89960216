"""Hidden attention of a selective scan: the weight of each token's input in each token's output.

A scan is linear in its input u. Unrolled, with tau_k as in `top_jax.ops.selective_scan` (delta_k, and with `decay` also
gap_k delta_{k-1})::

    y_i = sum_j alpha_ij u_j + D u_i        alpha_ij = sum_n C_i[n] exp(A[n] sum_{k=j+1..i} tau_k) delta_j B_j[n]

for j <= i in the scan's own order: one matrix per channel. The matrices of a block's G directions are put into the
tokens' order and added, as the outputs are. D and the gate SiLU(z) are left out, because they mix no tokens.

Source: arXiv 2403.01590 (The Hidden Attention of Mamba Models), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from top_jax.ops import ScanArguments, ScanPlan
from top_jax.typing import Array, Float, Int, PerToken, Selective

HIGHEST = jax.lax.Precision.HIGHEST


class _Direction(NamedTuple):
    """One scan direction, with its arrays in the order of its steps."""

    delta: Float[Array, "E B L"]  # after softplus
    A: Float[Array, "E N"]
    B: Selective
    C: Selective
    gap: PerToken
    steps: Int[Array, "B L"] | None  # step that visits each token; None if step i visits token i
    reverse: bool


def channel_attention(scan: ScanArguments, plan: ScanPlan) -> Float[Array, "B E L L"]:
    """Returns alpha of every channel, summed over the directions: float32 `[B, E, L, L]`, output tokens first.

    The result is large, so this is for small models. `hidden_attention` averages over channels without storing them.
    """
    directions = _directions(scan, plan)
    return jnp.moveaxis(jax.lax.map(lambda channel: _summed(directions, channel), _channels(directions)), 0, 1)


def hidden_attention(scan: ScanArguments, plan: ScanPlan, *, absolute: bool = True) -> Float[Array, "B L L"]:
    """Returns alpha averaged over the channels: float32 `[B, L, L]`, output tokens first.

    Args:
        scan: arguments of one block's scans (`Block.scan_arguments`).
        plan: the plan of those scans.
        absolute: average |alpha| (taken after the sum over directions), so that channels of opposite sign do not
            cancel.
    """
    directions = _directions(scan, plan)
    batch, length, width = scan.u.shape[1:]

    def add(total: jax.Array, channel: tuple[tuple[jax.Array, jax.Array], ...]) -> tuple[jax.Array, None]:
        alpha = _summed(directions, channel)
        return total + (jnp.abs(alpha) if absolute else alpha), None

    total, _ = jax.lax.scan(add, jnp.zeros((batch, length, length), jnp.float32), _channels(directions))
    return total / width


def _directions(scan: ScanArguments, plan: ScanPlan) -> list[_Direction]:
    return [_direction(scan.direction(g), plan, reverse) for g, reverse in enumerate(plan.reverse)]


def _direction(own: ScanArguments, plan: ScanPlan, reverse: bool) -> _Direction:
    delta, B, C = (array.astype(jnp.float32) for array in (own.delta, own.B, own.C))
    if own.delta_bias is not None:
        delta = delta + own.delta_bias.astype(jnp.float32)[None, None, :]
    delta = jax.nn.softplus(delta)
    steps = None
    if own.order is not None:
        steps = jnp.argsort(own.order, axis=-1)
        if plan.reorder_parameters:
            delta, B, C = (jnp.take_along_axis(array, own.order[:, :, None], axis=1) for array in (delta, B, C))
    gap = jnp.zeros(delta.shape[:2], jnp.float32) if own.gap is None else own.gap
    if reverse:
        delta, B, C, gap = (jnp.flip(array, axis=1) for array in (delta, B, C, gap))
    return _Direction(jnp.moveaxis(delta, -1, 0), own.A, B, C, gap, steps, reverse)


def _channels(directions: list[_Direction]) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Returns the arrays that differ between channels, channels first."""
    return tuple((direction.delta, direction.A) for direction in directions)


def _summed(directions: list[_Direction], channel: tuple[tuple[jax.Array, jax.Array], ...]) -> Float[Array, "B L L"]:
    matrices = [_alpha(direction, *own) for direction, own in zip(directions, channel, strict=True)]
    return jnp.sum(jnp.stack(matrices), axis=0)


def _alpha(direction: _Direction, delta: PerToken, A: Float[Array, " N"]) -> Float[Array, "B L L"]:
    """Returns alpha of one channel and direction, in the tokens' order."""
    before = jnp.pad(delta, ((0, 0), (1, 0)))[:, :-1]
    tau = delta + direction.gap * before
    later = jnp.tri(delta.shape[1], k=-1, dtype=jnp.float32)  # 1 where k > j
    # For each j, the sum from j + 1 on; the difference of two sums from the start would lose precision.
    elapsed = jnp.cumsum(tau[:, :, None] * later[None], axis=1)
    decay = jnp.exp(elapsed[:, :, :, None] * A[None, None, None, :])
    taken = delta[:, :, None] * direction.B
    alpha = jnp.einsum("bin,bijn,bjn->bij", direction.C, decay, taken, precision=HIGHEST)
    alpha = jnp.tril(alpha)
    if direction.reverse:
        alpha = jnp.flip(alpha, axis=(1, 2))
    if direction.steps is not None:
        rows = jnp.take_along_axis(alpha, direction.steps[:, :, None], axis=1)
        alpha = jnp.take_along_axis(rows, direction.steps[:, None, :], axis=2)
    return alpha
