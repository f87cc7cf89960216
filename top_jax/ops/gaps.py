"""How many pruned positions the state of a scan passes before each token."""

from __future__ import annotations

import jax.numpy as jnp

from top_jax.typing import PerToken, Positions


def gaps(positions: Positions, reverse: bool) -> PerToken:
    """Pruned positions between each token and the one scanned before it; 0 for the first scanned. float32 `[B, L]`."""
    between = jnp.diff(positions, axis=1) - 1
    return jnp.pad(between, ((0, 0), (0, 1) if reverse else (1, 0))).astype(jnp.float32)
