"""The sizes of a DeiT, checked."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from top_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeitConfig:
    """Sizes of a DeiT.

    Attributes:
        num_classes: width of the logits.
        img_size: (height, width) in pixels, multiples of the patch.
        patch_size: P, pixels; also the distance between patches.
        embed_dim: D, a multiple of the heads.
        depth: blocks.
        num_heads: attention heads, each D / num_heads wide.
        mlp_ratio: width of the MLP / D.
        drop_path: rate of the last block, in training; it grows from 0 over the blocks.
        dtype: of the matrix products and convolutions; the stream, norms and softmax stay float32.
        remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        InputError: sizes that do not fit together.
    """

    num_classes: int = 1000
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim={self.embed_dim} with num_heads={self.num_heads}: the heads share the width evenly; pass "
                "an embed_dim that is a multiple of num_heads (DeiT's heads are 64 wide)."
            )
        if self.patch_size < 1 or any(side < self.patch_size or side % self.patch_size for side in self.img_size):
            raise InputError(
                f"img_size={self.img_size} with patch_size={self.patch_size}: DeiT's patches tile the image; pass "
                "sides that are multiples of patch_size."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """M."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    def drop_path_rate(self, index: int) -> float:
        """Rate of block `index` (from 0): linspace(0, drop_path, depth)."""
        return 0.0 if self.depth == 1 else self.drop_path * index / (self.depth - 1)
