"""Sizes of a PlainMamba, checked."""

from __future__ import annotations

import dataclasses

from top_jax.errors import InputError
from top_jax.models.sizes import MambaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainMambaConfig(MambaConfig):
    """Sizes of a PlainMamba: those of `MambaConfig`, and its own.

    Attributes:
        img_size: any; the stem pads what does not fill a last patch with zeros.
        patch_size: even, because the stem halves the image before it cuts P / 2 patches; so is the stride.
        d_conv: side of the depthwise convolution on the grid, odd.
        num_convs_patch_embed: 3 x 3 convolutions in the stem.
        layers_with_dwconv: blocks, from 0, that end in a 3 x 3 depthwise convolution.
        reorder_parameters: let delta, B and C follow each traversal as u does. The official code does not (False, the
            default, which its checkpoints are trained with): see `PlainMambaMixer`.

    Raises:
        InputError: sizes outside these.
    """

    d_conv: int = 7
    num_convs_patch_embed: int = 1
    layers_with_dwconv: tuple[int, ...] = ()
    reorder_parameters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in (("patch_size", self.patch_size), ("stride", self.stride)):
            if size < 2 or size % 2:
                raise InputError(f"{name}={size}: PlainMamba's stem halves the image; pass an even number of pixels.")
        if self.d_conv % 2 == 0:
            raise InputError(f"d_conv={self.d_conv}; needed: an odd side, such as 7.")
        if self.num_convs_patch_embed < 0:
            raise InputError(f"num_convs_patch_embed={self.num_convs_patch_embed}; needed: 0 or more.")
        if any(not 0 <= layer < self.depth for layer in self.layers_with_dwconv):
            raise InputError(f"layers_with_dwconv={self.layers_with_dwconv}; the blocks are 0 to {self.depth - 1}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = (-(-side // self.stride) for side in self.img_size)  # the stem rounds up, twice
        return rows, columns
