"""How many pruned positions the state of a scan passes before each token."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from top_jax.typing import Array, Float, Int, PerToken, Positions


def gaps(positions: Positions, reverse: bool) -> PerToken:
    """Pruned positions between each token and the one scanned before it; 0 for the first scanned. float32 `[B, L]`."""
    between = jnp.diff(positions, axis=1) - 1
    return jnp.pad(between, ((0, 0), (0, 1) if reverse else (1, 0))).astype(jnp.float32)


def directional_gaps(positions: Int[Array, "_ B L"], reverse: Sequence[bool]) -> Float[Array, "G B L"]:
    """`gaps` of several directions, whose positions may be given once for all."""
    each = jnp.broadcast_to(positions, (len(reverse), *positions.shape[1:]))
    return jnp.stack([gaps(row, backwards) for row, backwards in zip(each, reverse, strict=True)])
