"""The scan as JAX alone invites one to write it: `lax.associative_scan`, gradients by autodiff. For comparison only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from top_jax.ops import ScanArguments
from top_jax.ops.xla import scanned_before

# What autodiff allocates, in arrays of [B, L, E, N] per direction: 433 MiB at B 8, L 197, E 384, N 16 (README) is 11.7.
STATES_KEPT = 12


def associative_scan(one: ScanArguments, reverse: bool) -> jax.Array:
    """Same arguments and result as `selective_scan_reference`, with float32 arrays and all but `gap` present."""
    assert one.D is not None and one.delta_bias is not None
    dt = jax.nn.softplus(one.delta + one.delta_bias[None, None, :])
    tau = dt if one.gap is None else dt + one.gap[:, :, None] * scanned_before(dt, reverse)
    decay = jnp.exp(tau[..., None] * one.A[None, None])  # [B, L, E, N]
    drive = (dt * one.u)[..., None] * one.B[:, :, None, :]
    merge = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])  # noqa: E731
    states = jax.lax.associative_scan(merge, (decay, drive), axis=1, reverse=reverse)[1]
    return jnp.sum(states * one.C[:, :, None, :], axis=-1) + one.D[None, None, :] * one.u
