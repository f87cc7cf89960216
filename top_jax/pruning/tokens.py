"""The tokens still alive, as they travel from stage to stage."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from top_jax.typing import Array, ClassIndex, Embedded, Float, Int, PerToken, Positions, Slots

ClassHome = Literal["middle", "first"]
"""Where the class token sits among the tokens of an image of which nothing is pruned."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens in the order in which the blocks see them, class token included.

    Attributes:
        x: `[B, L, D]` hidden state: in the computation dtype beside a residual stream, else float32 and the stream.
        residual: float32 `[B, L, D]` residual stream, to which x is yet to be added (ViM); None where x is the stream.
        positions: int32 `[B, L]` place of each token in the unpruned sequence: a raster place for a model without a
            class token; ViM's class token owns slot M // 2, DeiT's slot 0. -1 for a token that stands for no place.
        cls_index: int32 `[B]` where each image's class token sits along L (it differs per image once tokens are
            pruned), or None for a model without one.
        size: float32 `[B, L]` patches that each token stands for, or None before anything was merged: all ones.
        source: int32 `[B, M]` which patch token (0..K-1, class token left out) stands for each patch of the image,
            -1 for none; None where nothing is merged, so that positions tell.
        cls_home: where the class token of an unpruned image sits.
    """

    x: Embedded
    residual: Embedded | None
    positions: Positions
    cls_index: ClassIndex | None
    size: PerToken | None = None
    source: Int[Array, "B M"] | None = None
    cls_home: ClassHome = dataclasses.field(default="middle", metadata=dict(static=True))

    @property
    def num_patches(self) -> int:
        """K, patch tokens per image."""
        return self.positions.shape[1] - (self.cls_index is not None)

    def patch_slots(self) -> Slots:
        """int32 `[B, K]`: where the patch tokens sit along L, in order."""
        batch, length = self.positions.shape
        if self.cls_index is None:
            return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
        slots = jnp.arange(length - 1, dtype=jnp.int32)[None, :]
        return slots + (slots >= self.cls_index[:, None]).astype(jnp.int32)

    def keep(self, kept: Slots, *, condensed: bool) -> Tokens:
        """The patch tokens at slots `kept` `[B, K]`, and the class token.

        Args:
            kept: slots along L, increasing unless `condensed`.
            condensed: put the class token where it would sit in an image of K patches, instead of leaving it between
                its neighbours.
        """
        if self.cls_index is None:
            return self._take(kept, None)
        if condensed:
            return self._take(*_class_at_home(kept, self.cls_index, self.cls_home))
        return self._take(*_class_in_its_place(kept, self.cls_index))

    def append(
        self, x: Float[Array, "B D"], residual: Float[Array, "B D"] | None, size: Float[Array, " B"] | None
    ) -> Tokens:
        """With one more token at the end, which stands for no place of the image: its position is -1.

        Args:
            x: `[B, D]` its hidden state.
            residual: `[B, D]` its residual stream, where there is one.
            size: `[B]` patches that went into it, where sizes are kept.
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
        """`source` once the tokens at `slots` are left: -1 for the patches of one that is gone."""
        assert self.source is not None
        is_patch = jnp.ones(slots.shape, bool) if self.cls_index is None else slots != self.cls_index[:, None]
        rank = jnp.where(is_patch, jnp.cumsum(is_patch, axis=1, dtype=jnp.int32) - 1, -1)
        nowhere = jnp.full((self.positions.shape[1],), -1, jnp.int32)
        new_rank = jax.vmap(lambda slots, rank: nowhere.at[slots].set(rank))(slots, rank)  # of each slot
        slot = jnp.take_along_axis(self.patch_slots(), jnp.maximum(self.source, 0), axis=1)
        return jnp.where(self.source < 0, -1, jnp.take_along_axis(new_rank, slot, axis=1))


def _class_in_its_place(kept: Slots, cls_index: ClassIndex) -> tuple[Positions, ClassIndex]:
    slots = jnp.sort(jnp.concatenate([kept, cls_index[:, None]], axis=1), axis=1)
    return slots, jnp.sum(kept < cls_index[:, None], axis=1, dtype=cls_index.dtype)


def _class_at_home(kept: Slots, cls_index: ClassIndex, home: ClassHome) -> tuple[Positions, ClassIndex]:
    place = kept.shape[1] // 2 if home == "middle" else 0
    slots = jnp.concatenate([kept[:, :place], cls_index[:, None], kept[:, place:]], axis=1)
    return slots, jnp.full_like(cls_index, place)
