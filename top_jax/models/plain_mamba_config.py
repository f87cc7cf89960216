"""Sizes of a PlainMamba, checked."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from top_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainMambaConfig:
    """Sizes of a PlainMamba.

    Attributes:
        num_classes: width of the logits.
        img_size: (height, width) in pixels, even; the stem pads what does not fill a last patch with zeros.
        patch_size: P, pixels, even: the stem halves the image before it cuts P / 2 patches.
        stride: pixels between patches, even.
        embed_dim: D.
        depth: blocks.
        d_state: N.
        expand: E / D.
        d_conv: side of the depthwise convolution, odd.
        num_convs_patch_embed: 3 x 3 convolutions in the stem.
        layers_with_dwconv: blocks, from 0, that end in a 3 x 3 depthwise convolution.
        reorder_parameters: let delta, B and C follow each traversal as u does. The official code does not (False, the
            default, which its checkpoints are trained with): see `PlainMambaMixer`.
        drop_path: rate of the last block, in training; it grows from 0 over the blocks.
        dtype: of the matrix products and convolutions; everything else stays float32.
        implementation: of `top_jax.ops.directional_scan`.
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
    d_conv: int = 7
    num_convs_patch_embed: int = 1
    layers_with_dwconv: tuple[int, ...] = ()
    reorder_parameters: bool = False
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        for name, size in (("img_size", self.img_size), ("patch_size", self.patch_size), ("stride", self.stride)):
            if any(side < 2 or side % 2 for side in (size if isinstance(size, tuple) else (size,))):
                raise InputError(f"{name}={size}: PlainMamba's stem halves the image; pass even numbers of pixels.")
        if self.d_conv % 2 == 0:
            raise InputError(f"d_conv={self.d_conv}; needed: an odd side, such as 7.")
        if any(not 0 <= layer < self.depth for layer in self.layers_with_dwconv):
            raise InputError(f"layers_with_dwconv={self.layers_with_dwconv}; the blocks are 0 to {self.depth - 1}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = (-(-side // self.stride) for side in self.img_size)
        return rows, columns

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
        """Rate of block `index` (from 0): linspace(0, drop_path, depth)."""
        return 0.0 if self.depth == 1 else self.drop_path * index / (self.depth - 1)
