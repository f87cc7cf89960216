"""The specification of the aligned selective scan: float32, one token at a time, written like the paper.

Every other implementation is tested against this one; no model uses it by default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from top_jax.kernels.operands import ScanArguments
from top_jax.typing import Inner


def selective_scan_reference(one: ScanArguments, reverse: bool) -> Inner:
    """Scans one direction: the recurrence of `top_jax.ops.selective_scan`, with the gap of every token known.

    Args:
        one: the arrays of a single direction, without the axis of directions, already in the order of its steps
            (`order` is not read). D, delta_bias and gap may be None.
        reverse: scan the last token first.

    Returns:
        float32 `[B, L, E]`, before the gate.
    """
    u, delta, A, B, C = (a.astype(jnp.float32) for a in (one.u, one.delta, one.A, one.B, one.C))
    bias = one.delta_bias
    delta = jax.nn.softplus(delta if bias is None else delta + bias.astype(jnp.float32)[None, None, :])
    gap = jnp.zeros(u.shape[:2], jnp.float32) if one.gap is None else one.gap.astype(jnp.float32)

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]):
        h, delta_before = carry
        u_t, delta_t, B_t, C_t, gap_t = token
        decay = jnp.exp((delta_t + gap_t[:, None] * delta_before)[:, :, None] * A[None, :, :])
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]
        return (h, delta_t), jnp.sum(h * C_t[:, None, :], axis=-1)

    zero = jnp.zeros_like(delta[:, 0])  # made from the inputs, so that it is sharded over a mesh like them
    start = (zero[:, :, None] + jnp.zeros_like(A)[None], zero)
    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (u, delta, B, C, gap))
    _, y = jax.lax.scan(step, start, tokens, reverse=reverse)
    y = jnp.moveaxis(y, 0, 1)
    return y if one.D is None else y + one.D.astype(jnp.float32)[None, None, :] * u
