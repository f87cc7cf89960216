"""The sizes of a ViM, checked."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from top_jax.models.layers import patch_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Sizes of a ViM.

    Attributes:
        num_classes: width of the logits.
        img_size: (height, width) in pixels.
        patch_size: P, pixels.
        stride: pixels between patches.
        embed_dim: D.
        depth: blocks.
        d_state: N.
        expand: E / D.
        d_conv: taps of the causal convolution.
        drop_path: rate of the last block, in training; it grows from 0 over the blocks.
        dtype: of the matrix products and convolutions; everything else stays float32.
        implementation: of `top_jax.ops.selective_scan`.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int = 1000
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        patch_grid(self.img_size, self.patch_size, self.stride)  # raises where the sizes do not fit

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.img_size, self.patch_size, self.stride)

    @property
    def num_patches(self) -> int:
        """M."""
        return self.grid[0] * self.grid[1]

    @property
    def inner_dim(self) -> int:
        """E."""
        return self.expand * self.embed_dim

    @property
    def dt_rank(self) -> int:
        """R = ceil(D / 16)."""
        return -(-self.embed_dim // 16)

    def drop_path_rate(self, index: int) -> float:
        """Rate of block `index` (from 0): `index`-th of [0] + linspace(0, drop_path, depth), as officially."""
        return 0.0 if index == 0 or self.depth == 1 else self.drop_path * (index - 1) / (self.depth - 1)
