"""Layers that several backbones share."""

from __future__ import annotations

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

    Source: hustvl/Vim, vim/models_mamba.py, `PatchEmbed`; its initial values are the defaults here.
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
        """Maps `[B, H, W, 3]` to `[B, M, D]`, patches in raster order."""
        return rearrange(self.proj(images), "b rows columns d -> b (rows columns) d")


def patch_grid(img_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Returns the rows and columns of patches.

    Raises:
        InputError: (image side - patch size) is negative or not divisible by the stride.
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


class BatchNorm(nnx.Module):
    """Normalises each channel over all other axes, in float32.

    In train mode it uses the mean and variance of the batch, and updates the running ones by `momentum`. The running
    variance tracks the unbiased variance, n / (n - 1) times that of the batch, as in PyTorch but not in
    flax.nnx.BatchNorm. In eval mode it uses the running ones. On a mesh, the batch is the global one, over all devices.

    Source: torch.nn.BatchNorm2d (momentum 0.1, eps 1e-5).
    """

    def __init__(self, width: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False  # set by Module.train() and Module.eval()
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))
        # PyTorch's num_batches_tracked, only kept to convert back; a float, so that jax.grad accepts the model.
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises `[..., D]`; returns the dtype of x."""
        x32 = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = jnp.mean(x32, axis=range(x.ndim - 1))
            var = jnp.var(x32, axis=range(x.ndim - 1))
            self._update(mean, var, count=x.size // x.shape[-1])
        scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
        shape = (1,) * (x.ndim - 1) + (-1,)
        return ((x32 - mean.reshape(shape)) * scale.reshape(shape) + self.bias[...].reshape(shape)).astype(x.dtype)

    def _update(self, mean: Float[Array, " D"], var: Float[Array, " D"], count: int) -> None:
        mean, var = jax.lax.stop_gradient((mean, var))
        kept, new = 1 - self.momentum, self.momentum
        self.mean[...] = kept * self.mean[...] + new * mean
        self.var[...] = kept * self.var[...] + new * var * (count / max(count - 1, 1))
        self.num_batches[...] += 1


def moves_statistics(module: nnx.Module) -> bool:
    """Returns whether calling `module` would update the statistics of a BatchNorm in it, ours or Flax's."""
    return any(not getattr(part, "use_running_average", True) for _, part in nnx.iter_modules(module))


class DropPath(nnx.Module):
    """Stochastic depth: in training, zeroes a whole branch of an image with probability `rate` and scales the others.

    The draw depends only on the image's own key, not on the other images of the batch, nor on how the batch is split
    over devices and micro-batches.

    Source: arXiv 1603.09382; timm's `DropPath`.
    """

    def __init__(self, rate: float, index: int):
        self.rate: float | jax.Array = rate  # an array in a loop over blocks (block_loop.py), and so is the index
        self.index: int | jax.Array = index  # index of this drop-path in the model, folded into the keys
        self.deterministic = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Embedded, keys: jax.Array | None) -> Embedded:
        """Drops some images' branches `[B, L, D]`.

        Args:
            x: output of the branch.
            keys: `[B]` PRNG keys, one per image; needed in train mode with a rate above 0.

        Raises:
            InputError: the keys are missing.
        """
        drops = isinstance(self.rate, jax.Array) or self.rate > 0
        if self.deterministic or not drops:
            return x
        if keys is None:
            raise InputError(
                "a model in train mode with drop_path > 0 needs keys=..., one per image; pass them, or call .eval()."
            )
        return _dropped(x, keys, self.rate, self.index, shape=(1, 1))


class Dropout2d(nnx.Module):
    """In training, zeroes whole channels of an image with probability `rate` and scales the others.

    The draw depends only on the image's own key, as in `DropPath`.

    Source: torch.nn.Dropout2d.
    """

    def __init__(self, rate: float, index: int):
        self.rate = rate
        self.index = index  # folded into the keys; differs from that of every DropPath
        self.deterministic = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Float[Array, "B H W D"], keys: jax.Array | None) -> Float[Array, "B H W D"]:
        """Drops some channels of each image.

        Args:
            x: a map.
            keys: `[B]` PRNG keys, one per image; needed in train mode with a rate above 0.

        Raises:
            InputError: the keys are missing.
        """
        if self.deterministic or self.rate == 0:
            return x
        if keys is None:
            raise InputError("a segmenter in train mode needs keys=..., one per image; pass them, or call .eval().")
        return _dropped(x, keys, self.rate, self.index, shape=(1, 1, x.shape[3]))


def _dropped(
    x: jax.Array, keys: jax.Array, rate: float | jax.Array, index: int | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Zeroes parts of each image with probability `rate` and divides the others by `1 - rate`.

    Args:
        x: `[B, ...]`.
        keys: `[B]` PRNG keys.
        rate: in [0, 1).
        index: folded into the keys.
        shape: shape of one image's draws, which are broadcast over the rest of the image.
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, shape)

    return jnp.where(jax.vmap(draw)(keys), x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a float32 LayerNorm whose variance is the mean of squared differences, as in PyTorch."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def causal_conv1d(x: Inner, kernel: Float[Array, "width E"], bias: PerChannel, *, reverse: bool) -> Inner:
    """Convolves each channel along L, over the tokens that are left; a token sees itself and tokens scanned before it.

    Args:
        x: `[B, L, E]`.
        kernel: `[width, E]`; the last tap weighs the token itself.
        bias: `[E]`.
        reverse: whether the scan runs from the last token to the first.

    Returns:
        `[B, L, E]`, dtype of x. A sum of shifted products, which XLA fuses, unlike a grouped convolution.

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
