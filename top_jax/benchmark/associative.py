"""The scan as JAX alone invites one to write it: `lax.associative_scan`, gradients by autodiff. For comparison only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from top_jax.ops.xla import scanned_before

# What autodiff allocates, in arrays of [B, L, E, N] per direction: 433 MiB at B 8, L 197, E 384, N 16 (README) is 11.7.
STATES_KEPT = 12


def associative_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    z: None,
    delta_bias: jax.Array,
    gap: jax.Array | None,
    reverse: bool,
) -> jax.Array:
    """Same arguments and result as `selective_scan_reference`, on float32 arrays and without a gate."""
    del z  # `one_by_one` gates the sum over directions
    dt = jax.nn.softplus(delta + delta_bias[None, None, :])
    tau = dt if gap is None else dt + gap[:, :, None] * scanned_before(dt, reverse)
    decay = jnp.exp(tau[..., None] * A[None, None])  # [B, L, E, N]
    drive = (dt * u)[..., None] * B[:, :, None, :]
    merge = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])  # noqa: E731
    states = jax.lax.associative_scan(merge, (decay, drive), axis=1, reverse=reverse)[1]
    return jnp.sum(states * C[:, :, None, :], axis=-1) + D[None, None, :] * u
