"""Layers that several backbones share."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from top_jax.errors import InputError
from top_jax.models import initializers as init
from top_jax.typing import Array, Embedded, Float, Images, Inner, PerChannel


class PatchEmbed(nnx.Module):
    """Cuts images into P x P patches, `stride` apart, and projects each to width D.

    Source: hustvl/Vim, vim/models_mamba.py, `PatchEmbed`, whose initial values are the default.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        stride: int,
        *,
        dtype: DTypeLike,
        kernel_init: init.Initializer = init.patch_embed,
        bias_init: init.Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        self.proj = nnx.Conv(
            3,
            embed_dim,
            kernel_size=(patch_size, patch_size),
            strides=(stride, stride),
            padding="VALID",
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def __call__(self, images: Images) -> Float[Array, "B M D"]:
        """`[B, H, W, 3]` to `[B, M, D]`, patches in raster order."""
        return rearrange(self.proj(images), "b rows columns d -> b (rows columns) d")


def height_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """An image size as (height, width); an int is a square."""
    if isinstance(img_size, int):
        return img_size, img_size
    if not isinstance(img_size, Sequence) or isinstance(img_size, str) or len(img_size) != 2:
        raise InputError(f"img_size={img_size!r}; needed: a side, or (height, width).")
    return img_size[0], img_size[1]


def patch_grid(img_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        InputError: (image side - patch) is negative or not divisible by the stride.
    """
    for side in img_size:
        if side < patch_size or (side - patch_size) % stride:
            fits = patch_size + max(0, (side - patch_size) // stride) * stride
            raise InputError(
                f"img_size={img_size} with patch_size={patch_size} and stride={stride}: ({side} - {patch_size}) is not "
                f"divisible by the stride; sides such as {fits} or {fits + stride} are."
            )
    height, width = ((side - patch_size) // stride + 1 for side in img_size)
    return height, width


class DropPath(nnx.Module):
    """Stochastic depth: in training, zeroes a whole branch of an image with probability `rate` and scales the rest.

    The draw is a function of the image's own key, so that it depends neither on the batch around the image nor on
    how the batch is split over devices and micro-batches.

    Source: arXiv 1603.09382; timm's `DropPath`.
    """

    def __init__(self, rate: float, index: int):
        self.rate = rate
        self.index = index  # which drop-path of the model this is: folded into the keys
        self.deterministic = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Embedded, keys: jax.Array | None) -> Embedded:
        """Applies to `[B, L, D]`; `keys` `[B]`, one per image, is needed in training with a rate above 0."""
        if self.deterministic or self.rate == 0:
            return x
        if keys is None:
            raise InputError("a model in train mode with drop_path > 0 needs keys=..., one key per image, or .eval().")
        draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, self.index), 1 - self.rate)  # noqa: E731
        keep = jax.vmap(draw)(keys)[:, None, None]
        return jnp.where(keep, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros_like(x))


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """float32, with the variance as PyTorch computes it (the mean of squared differences)."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def causal_conv1d(x: Inner, kernel: Float[Array, "width E"], bias: PerChannel, *, reverse: bool) -> Inner:
    """Depthwise convolution along L that sees no token later in the scan.

    Args:
        x: `[B, L, E]`.
        kernel: `[width, E]`; the last tap weighs the token itself.
        bias: `[E]`.
        reverse: the scan runs from the last token to the first.

    Returns:
        `[B, L, E]`, dtype of x. A sum of shifted products: XLA fuses it, where a grouped convolution would not.

    Source: Dao-AILab/causal-conv1d, `causal_conv1d_ref` (without its activation).
    """
    taps, length = kernel.shape[0], x.shape[1]
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    padded = jnp.pad(x, ((0, 0), (0, taps - 1) if reverse else (taps - 1, 0), (0, 0)))
    y = bias[None, None, :]
    for tap in range(taps):
        offset = taps - 1 - tap if reverse else tap
        y = y + padded[:, offset : offset + length] * kernel[tap][None, None, :]
    return y
