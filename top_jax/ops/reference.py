"""The specification of the aligned selective scan: float32, one token at a time, to read beside the paper.

Every other implementation is tested against this one; no model uses it by default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from top_jax.typing import Inner, PerChannel, PerToken, Selective, StateMatrix


def selective_scan_reference(
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
    """The recurrence of `selective_scan`, with the gap of every token already known.

    Args:
        u: `[B, L, E]` input.
        delta: `[B, L, E]` time step before bias and softplus.
        A: `[E, N]` decay rates (negative for a stable scan).
        B: `[B, L, N]` input projection.
        C: `[B, L, N]` output projection.
        D: `[E]` skip weight, or None.
        z: `[B, L, E]` gate before SiLU, or None.
        delta_bias: `[E]`, or None.
        gap: `[B, L]` pruned positions between a token and the one scanned before it, through which the state
            decays; None is no gap anywhere.
        reverse: scan the last token first.

    Returns:
        `[B, L, E]` in the dtype of u.
    """
    u32, delta, A, B, C = (a.astype(jnp.float32) for a in (u, delta, A, B, C))
    delta = jax.nn.softplus(delta if delta_bias is None else delta + delta_bias.astype(jnp.float32)[None, None, :])
    gap = jnp.zeros(u.shape[:2], jnp.float32) if gap is None else gap.astype(jnp.float32)

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]):
        h, delta_before = carry
        u_t, delta_t, B_t, C_t, gap_t = token
        decay = jnp.exp((delta_t + gap_t[:, None] * delta_before)[:, :, None] * A[None, :, :])
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]
        return (h, delta_t), jnp.sum(h * C_t[:, None, :], axis=-1)

    nothing = jnp.zeros_like(delta[:, 0])  # made from the inputs, to lie on a mesh as they do
    start = (nothing[:, :, None] + jnp.zeros_like(A)[None], nothing)
    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (u32, delta, B, C, gap))
    _, y = jax.lax.scan(step, start, tokens, reverse=reverse)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None, :] * u32
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(u.dtype)
