"""The tokens still alive, as they travel from stage to stage."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from top_jax.typing import ClassIndex, Embedded, Positions, Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens in scan order, class token included.

    Attributes:
        x: `[B, L, D]` hidden state, in the computation dtype.
        residual: float32 `[B, L, D]` residual stream, to which x is yet to be added.
        positions: int32 `[B, L]` place of each token in the unpruned scan; ViM's class token owns slot M // 2.
        cls_index: int32 `[B]` where each image's class token sits along L (it differs per image once tokens are
            pruned), or None for a model without one.
    """

    x: Embedded
    residual: Embedded
    positions: Positions
    cls_index: ClassIndex | None

    def patch_slots(self) -> Slots:
        """int32 `[B, K]`: where the patch tokens sit along L, in order."""
        batch, length = self.positions.shape
        if self.cls_index is None:
            return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
        slots = jnp.arange(length - 1, dtype=jnp.int32)[None, :]
        return slots + (slots >= self.cls_index[:, None]).astype(jnp.int32)

    def take(self, slots: Slots, cls_index: ClassIndex | None) -> Tokens:
        """The tokens at `slots` `[B, K]`; `cls_index` says where the class token now is."""
        return Tokens(
            x=jnp.take_along_axis(self.x, slots[:, :, None], axis=1),
            residual=jnp.take_along_axis(self.residual, slots[:, :, None], axis=1),
            positions=jnp.take_along_axis(self.positions, slots, axis=1),
            cls_index=cls_index,
        )
