"""The sizes of a DeiT, checked."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from top_jax.errors import InputError
from top_jax.models.sizes import BackboneConfig
from top_jax.pruning import ClassHome


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeitConfig(BackboneConfig):
    """Sizes of a DeiT: those of `BackboneConfig`, and its own.

    Attributes:
        img_size: multiples of the patch.
        num_heads: attention heads, each D / num_heads wide.
        mlp_ratio: width of the MLP / D.

    Raises:
        InputError: sizes that do not fit together.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = "first"

    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_dim < 1:
            raise InputError(f"mlp_ratio={self.mlp_ratio!r}; needed: above 0, such as 4.")
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
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)
