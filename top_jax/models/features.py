"""What a backbone hands to a dense task: the tokens that are left, and where they were."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from top_jax.pruning import Tokens
from top_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Final tokens of a batch.

    Attributes:
        x: float32 `[B, K, D]` patch tokens after the final norm.
        positions: int32 `[B, K]` each token's place in raster order, 0..M-1.
        cls: float32 `[B, D]` the class token after the final norm, or None for a model without one.
    """

    x: Float[Array, "B K D"]
    positions: Int[Array, "B K"]
    cls: Float[Array, "B D"] | None


def split_class_token(tokens: Tokens, slot: int) -> Features:
    """Parts patch tokens from the class token, which owns scan position `slot`."""
    if tokens.cls_index is None:
        return Features(tokens.x, tokens.positions, None)
    slots = tokens.patch_slots()
    positions = jnp.take_along_axis(tokens.positions, slots, axis=1)
    return Features(
        x=jnp.take_along_axis(tokens.x, slots[:, :, None], axis=1),
        positions=positions - (positions > slot).astype(positions.dtype),
        cls=jnp.take_along_axis(tokens.x, tokens.cls_index[:, None, None], axis=1)[:, 0],
    )
