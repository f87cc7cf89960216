"""The tokens that are passed from block to block, how a reduction gathers them, and where the class token goes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from top_jax.typing import Array, ClassIndex, Embedded, Float, Int, PerToken, Positions, Slots

ClassHome = Literal["middle", "first"]
"""Position of the class token among the tokens of an unpruned image."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens in the order in which the blocks see them, class token included.

    Attributes:
        x: `[B, L, D]` hidden state. It has the computation dtype if there is a separate residual stream; otherwise it
            is the float32 residual stream itself.
        residual: float32 `[B, L, D]` residual stream, to which x has not been added yet (ViM), or None.
        positions: int32 `[B, L]` index of each token in the unpruned sequence; -1 for a token without one. Without a
            class token it is the patch's raster index; the class token has index M // 2 in ViM, and 0 in DeiT.
        cls_index: int32 `[B]` index of each image's class token along L, or None for a model without one. It differs
            between images once tokens are pruned.
        size: float32 `[B, L]` number of patches that each token stands for; None (one each) before the first merge.
        source: int32 `[B, M]` which patch token (0..K-1, not counting the class token) stands for each patch of the
            image, -1 for none; None if nothing was merged, because then it follows from `positions`.
        cls_home: position of the class token in an unpruned image.
        grid: rows and columns of patches of the unpruned image; None where they are those of the model's config.
    """

    x: Embedded
    residual: Embedded | None
    positions: Positions
    cls_index: ClassIndex | None
    size: PerToken | None = None
    source: Int[Array, "B M"] | None = None
    cls_home: ClassHome = dataclasses.field(default="middle", metadata=dict(static=True))
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def num_patches(self) -> int:
        """K, number of patch tokens per image."""
        return self.positions.shape[1] - (self.cls_index is not None)

    def patch_slots(self) -> Slots:
        """Returns the indices of the patch tokens along L, int32 `[B, K]`; the class token is never a candidate."""
        batch, length = self.positions.shape
        if self.cls_index is None:
            return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
        slots = jnp.arange(length - 1, dtype=jnp.int32)[None, :]
        return slots + (slots >= self.cls_index[:, None]).astype(jnp.int32)

    def keep(self, kept: Slots, *, condensed: bool) -> Tokens:
        """Gathers the patch tokens at `kept`, and the class token.

        Args:
            kept: `[B, K]` slots along L, increasing unless `condensed`.
            condensed: whether to move the class token to its position in an image of K patches; otherwise it stays
                between its neighbours.
        """
        if self.cls_index is None:
            return self._take(kept, None)
        if condensed:
            return self._take(*_class_at_home(kept, self.cls_index, self.cls_home))
        return self._take(*_class_in_its_place(kept, self.cls_index))

    def append(
        self, x: Float[Array, "B D"], residual: Float[Array, "B D"] | None, size: Float[Array, " B"] | None
    ) -> Tokens:
        """Appends a token that belongs to no single patch: its position is -1.

        Args:
            x: `[B, D]` hidden state of the token.
            residual: `[B, D]` residual stream of the token, or None if there is none.
            size: `[B]` number of patches that the token stands for, or None if sizes are not counted.
        """

        def end(array: Array | None, new: Array | None) -> Array | None:
            if array is None or new is None:
                return None
            return jnp.concatenate([array, new[:, None].astype(array.dtype)], axis=1)

        nowhere = jnp.full((self.positions.shape[0],), -1, jnp.int32)
        longer, positions = end(self.x, x), end(self.positions, nowhere)
        assert longer is not None and positions is not None
        return dataclasses.replace(
            self, x=longer, residual=end(self.residual, residual), positions=positions, size=end(self.size, size)
        )

    def _take(self, slots: Slots, cls_index: ClassIndex | None) -> Tokens:
        def take(array: Array | None) -> Array | None:
            index = slots if array is None or array.ndim == 2 else slots[:, :, None]
            return None if array is None else jnp.take_along_axis(array, index, axis=1)

        x, positions = take(self.x), take(self.positions)
        assert x is not None and positions is not None
        return dataclasses.replace(
            self,
            x=x,
            residual=take(self.residual),
            positions=positions,
            size=take(self.size),
            cls_index=cls_index,
            source=None if self.source is None else self._sources_among(slots),
        )

    def _sources_among(self, slots: Slots) -> Int[Array, "B M"]:
        """Returns `source` once only the tokens at `slots` are left; -1 for the patches of a dropped token."""
        assert self.source is not None
        is_patch = jnp.ones(slots.shape, bool) if self.cls_index is None else slots != self.cls_index[:, None]
        rank = jnp.where(is_patch, jnp.cumsum(is_patch, axis=1, dtype=jnp.int32) - 1, -1)
        nowhere = jnp.full((self.positions.shape[1],), -1, jnp.int32)
        new_rank = jax.vmap(lambda slots, rank: nowhere.at[slots].set(rank))(slots, rank)  # by old slot
        slot = jnp.take_along_axis(self.patch_slots(), jnp.maximum(self.source, 0), axis=1)
        return jnp.where(self.source < 0, -1, jnp.take_along_axis(new_rank, slot, axis=1))


def _class_in_its_place(kept: Slots, cls_index: ClassIndex) -> tuple[Positions, ClassIndex]:
    slots = jnp.sort(jnp.concatenate([kept, cls_index[:, None]], axis=1), axis=1)
    return slots, jnp.sum(kept < cls_index[:, None], axis=1, dtype=cls_index.dtype)


def _class_at_home(kept: Slots, cls_index: ClassIndex, home: ClassHome) -> tuple[Positions, ClassIndex]:
    place = kept.shape[1] // 2 if home == "middle" else 0
    slots = jnp.concatenate([kept[:, :place], cls_index[:, None], kept[:, place:]], axis=1)
    return slots, jnp.full_like(cls_index, place)
