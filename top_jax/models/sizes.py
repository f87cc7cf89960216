"""Sizes that all backbones have, and those that all Mamba backbones have; each family adds its own."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Final

import jax.numpy as jnp
from jax.typing import DTypeLike

from top_jax.ops.checks import DTYPES
from top_jax.ops.implementations import IMPLEMENTATIONS
from top_jax.pruning import ClassHome
from top_jax.values import check_fields, height_width, one_of, refused, whole

# Far above any model, so that a wrong number is an error before it fills the memory.
MOST_CLASSES: Final = 2**20
MOST_BLOCKS: Final = 2**10
LARGEST_SIZE: Final = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(abc.ABC):
    """Sizes of a backbone; each family adds its own, and changes defaults.

    Attributes:
        num_classes: width of the logits; 0 for a model without a head, which returns pooled features.
        img_size: (height, width) in pixels.
        patch_size: P, pixels.
        embed_dim: D.
        depth: blocks.
        drop_path: stochastic depth rate of the last block in training; the rate grows from 0 over the blocks.
        dtype: dtype of matrix products and convolutions; everything else is float32.
        remat: recompute each block in the backward pass instead of storing its activations. Otherwise equal blocks of
            a train step store only matrix products and scans (`top_jax.models.block_loop`).

    Raises:
        InputError: a value out of range.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = None
    """Place of the class token among the tokens of an unpruned image; None without one."""

    num_classes: int = 1000
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 24
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        whole("num_classes", self.num_classes, 0, MOST_CLASSES)
        whole("depth", self.depth, 1, MOST_BLOCKS)
        self._check_positive("patch_size", "embed_dim")
        object.__setattr__(self, "img_size", height_width("img_size", self.img_size))
        if not 0 <= self.drop_path < 1:
            raise refused("drop_path", self.drop_path, "a rate in [0, 1)")
        if not _is_float(self.dtype):
            raise refused("dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            whole(name, getattr(self, name), 1, LARGEST_SIZE)

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    def num_patches(self) -> int:
        """M, patches of the whole image."""
        return self.grid[0] * self.grid[1]

    def drop_path_rate(self, index: int) -> float:
        """Returns the drop-path rate of block `index` (from 0): linspace(0, drop_path, depth)[index]."""
        return 0.0 if self.depth == 1 else self.drop_path * index / (self.depth - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(BackboneConfig):
    """Sizes of a backbone whose blocks scan.

    Attributes:
        stride: pixels from one patch to the next.
        d_state: N.
        expand: E / D.
        d_conv: taps of the convolution before the scan.
        implementation: implementation of the scan, one of `top_jax.ops.implementations.IMPLEMENTATIONS`.

    Raises:
        InputError: a value out of range.
    """

    stride: int = 16
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("stride", "d_state", "expand", "d_conv")
        one_of("implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def inner_dim(self) -> int:
        """E, width of the scan."""
        return self.expand * self.embed_dim

    @property
    def dt_rank(self) -> int:
        """R = ceil(D / 16), rank of the time step's projection."""
        return -(-self.embed_dim // 16)


def _is_float(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.dtype(dtype).name in DTYPES  # jnp.dtype(None) is float64
    except TypeError:
        return False
