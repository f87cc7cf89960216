"""The scan as JAX alone invites one to write it: `lax.associative_scan`, gradients by autodiff. For comparison only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# What autodiff allocates, in arrays of [B, L, E, N] per direction: 433 MiB at B 8, L 197, E 384, N 16 (README) is 11.7.
STATES_KEPT = 12


def associative_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    delta_bias: jax.Array,
    z: jax.Array | None = None,
    order: jax.Array | None = None,
    *,
    gap: jax.Array | None,
    reverse: tuple[bool, ...],
    reorder_parameters: bool,
) -> jax.Array:
    """`directional_scan` without positions (a gap `[G, B, L]` instead) and without a score; `[B, L, E]`."""
    total: Any = 0.0
    for g, backwards in enumerate(reverse):
        pick = lambda array, g=g: array[min(g, len(array) - 1)]  # noqa: E731
        x, dt, b, c = (pick(array).astype(jnp.float32) for array in (u, delta, B, C))
        skip, bias, a = pick(D), pick(delta_bias), pick(A)
        if order is not None:
            visited = pick(order)[:, :, None]
            x = jnp.take_along_axis(x, visited, axis=1)
            if reorder_parameters:
                dt, b, c = (jnp.take_along_axis(array, visited, axis=1) for array in (dt, b, c))
        y = _one(x, jax.nn.softplus(dt + bias), a, b, c, None if gap is None else pick(gap), backwards) + skip * x
        if order is not None:
            y = jnp.take_along_axis(y, jnp.argsort(pick(order), axis=1)[:, :, None], axis=1)
        total = total + y
    gated = total if z is None else total * jax.nn.silu(z.astype(jnp.float32))
    return gated.astype(u.dtype)


def _one(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, gap: jax.Array | None, reverse: bool
) -> jax.Array:
    tau = dt
    if gap is not None:
        before = (
            jnp.pad(dt[:, 1:], ((0, 0), (0, 1), (0, 0))) if reverse else jnp.pad(dt[:, :-1], ((0, 0), (1, 0), (0, 0)))
        )
        tau = dt + gap[:, :, None] * before
    decay = jnp.exp(tau[..., None] * a)  # [B, L, E, N]
    drive = (dt * x)[..., None] * b[:, :, None, :]
    merge = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])  # noqa: E731
    states = jax.lax.associative_scan(merge, (decay, drive), axis=1, reverse=reverse)[1]
    return jnp.sum(states * c[:, :, None, :], axis=-1)
