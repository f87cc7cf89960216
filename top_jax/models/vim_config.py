"""Sizes of a ViM, checked."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from top_jax.models.layers import patch_grid
from top_jax.models.sizes import MambaConfig
from top_jax.pruning import ClassHome


@dataclasses.dataclass(frozen=True, kw_only=True)
class VimConfig(MambaConfig):
    """Sizes of a ViM: those of `MambaConfig`; the convolution before its scans is causal.

    Raises:
        InputError: an image that patches and stride do not tile.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        patch_grid(self.img_size, self.patch_size, self.stride)  # raises where the sizes do not fit

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.img_size, self.patch_size, self.stride)

    def drop_path_rate(self, index: int) -> float:
        """Rate of block `index` (from 0): `index`-th of [0] + linspace(0, drop_path, depth), as officially."""
        return 0.0 if index == 0 or self.depth == 1 else self.drop_path * (index - 1) / (self.depth - 1)
