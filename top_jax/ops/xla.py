"""The selective scan on plain XLA operations, with a gradient of its own: CPU, TPU and any shape.

Everything that is O(B L E) (bias, softplus, gaps, skip, gate) is ordinary JAX and differentiates itself. Only
the recurrence, whose autodiff would keep every state, has a hand-written gradient (`kernels/chunked_scan.py`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from top_jax.kernels.chunked_scan import (
    ScanInputs,
    chunked_scan_backward,
    chunked_scan_forward,
    scan_forward,
)
from top_jax.typing import Inner, PerChannel, PerToken, Selective, StateMatrix


def selective_scan_xla(
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
    """Same arguments and result as `selective_scan_reference`; chunked, with its own VJP."""
    u32, delta, A, B, C = (a.astype(jnp.float32) for a in (u, delta, A, B, C))
    delta = jax.nn.softplus(delta if delta_bias is None else delta + delta_bias.astype(jnp.float32)[None, None, :])
    tau = delta if gap is None else delta + gap.astype(jnp.float32)[:, :, None] * scanned_before(delta, reverse)

    steps = ScanInputs(*(jnp.moveaxis(a, 1, 0) for a in (tau, delta * u32, B, C)))
    # Within shard_map every device has its own tokens and all have this A. Plus zeros of the tokens' it counts as the
    # device's own, as the rule for its gradient has to see it, and JAX sums the gradients over the devices.
    A = A + jnp.sum(jnp.zeros_like(u32), axis=(0, 1))[:, None]
    y = jnp.moveaxis(_recurrence(reverse, steps, A.T), 0, 1)
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None, :] * u32
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(u.dtype)


def scanned_before(delta: Inner, reverse: bool) -> Inner:
    """The delta of the token scanned before each token; zero for the first."""
    if reverse:
        return jnp.pad(delta[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.pad(delta[:, :-1], ((0, 0), (1, 0), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(reverse: bool, steps: ScanInputs, A: jax.Array) -> jax.Array:
    return scan_forward(steps, A, reverse=reverse)


def _forward(reverse: bool, steps: ScanInputs, A: jax.Array):
    y, starts = chunked_scan_forward(steps, A, reverse=reverse)
    return y, (steps, A, starts)


def _backward(reverse: bool, saved: tuple[ScanInputs, jax.Array, jax.Array], dy: jax.Array):
    steps, A, starts = saved
    return chunked_scan_backward(steps, A, starts, dy, reverse=reverse)


_recurrence.defvjp(_forward, _backward)
