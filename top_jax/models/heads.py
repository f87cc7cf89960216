"""Heads of dense tasks: UPerNet's decoder, its auxiliary head, and the neck that makes a pyramid of ViM's maps.

    maps [B, h, w, D] x 4 -> (neck) -> UPerHead -> logits [B, h, w, classes]
                                    -> FCNHead, of one map, in training

Sources: mmsegmentation 0.29.1, mmseg/models/decode_heads/{uper_head, fcn_head, psp_head}.py; mmcv's `ConvModule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from top_jax.models import initializers as init
from top_jax.models.layers import BatchNorm, Dropout2d
from top_jax.models.resizing import AnyMap, Map, Resized, adaptive_average_pool, resize, size_of
from top_jax.typing import Array, Float

POOL_SCALES: Final = (1, 2, 3, 6)
DROPOUT: Final = 0.1


class ConvModule(nnx.Module):
    """Convolution without bias -> BatchNorm -> ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            kernel_size=(side, side),
            padding=side // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=init.kaiming_normal_fan_out,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B H W outputs"]:
        """Maps `[B, H, W, inputs]` to `[B, H, W, outputs]`, in the module's dtype."""
        return jax.nn.relu(self.bn(self.conv(x)))


class Classifier(nnx.Module):
    """Dropout2d, and the logits of each pixel of a map."""

    def __init__(self, inputs: int, num_classes: int, *, dropout_index: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dropout = Dropout2d(DROPOUT, dropout_index)
        self.dtype = dtype
        self.conv_seg = make_conv_seg(inputs, num_classes, dtype, rngs)

    def __call__(self, x: Map, keys: jax.Array | None) -> Float[Array, "B H W classes"]:
        """Maps `[B, H, W, inputs]` to float32 logits; `keys` as for `Dropout2d`."""
        return self.conv_seg(self.dropout(x, keys)).astype(jnp.float32)

    def reset(self, num_classes: int, rngs: nnx.Rngs) -> None:
        """Replaces the last layer by one for other classes, with random weights."""
        self.conv_seg = make_conv_seg(self.conv_seg.kernel.shape[2], num_classes, self.dtype, rngs)


def make_conv_seg(inputs: int, num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """Returns the last layer of a head, with weights drawn from N(0, 0.01) and a zero bias."""
    start = jax.nn.initializers.normal(0.01, jnp.float32)
    return nnx.Conv(inputs, num_classes, kernel_size=(1, 1), dtype=dtype, kernel_init=start, rngs=rngs)


class UPerHead(nnx.Module):
    """UPerNet's decode head: pools the last map in a pyramid, adds it top-down to the others, and fuses all four.

    Source: arXiv 1807.10221; mmseg's `UPerHead`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        dropout_index: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            widths: channels of each map, finest first.
            channels: width of the head.
            num_classes: width of the logits.
            dropout_index: as for `Dropout2d`.
            dtype: dtype of convolutions; everything else is float32.
            rngs: source of the weights.
        """

        def conv(width: int, side: int) -> ConvModule:
            return ConvModule(width, channels, side, dtype=dtype, rngs=rngs)

        self.psp_modules = nnx.List([conv(widths[-1], 1) for _ in POOL_SCALES])
        self.bottleneck = conv(widths[-1] + len(POOL_SCALES) * channels, 3)
        self.lateral_convs = nnx.List([conv(width, 1) for width in widths[:-1]])
        self.fpn_convs = nnx.List([conv(channels, 3) for _ in widths[:-1]])
        self.fpn_bottleneck = conv(len(widths) * channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout_index=dropout_index, dtype=dtype, rngs=rngs)

    def __call__(self, maps: Sequence[AnyMap], keys: jax.Array | None = None) -> Float[Array, "B H W classes"]:
        """Returns float32 logits at the size of the first map.

        Args:
            maps: `[B, h, w, width]`, finest first.
            keys: `[B]` PRNG keys, one per image; needed in train mode.
        """
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pooled(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], size_of(levels[i - 1]))
        size = size_of(levels[0])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        together = jnp.concatenate([resize(x, size) for x in outs], axis=-1)
        return self.classifier(self.fpn_bottleneck(together), keys)

    def pooled(self, x: Map) -> Float[Array, "B H W channels"]:
        """Returns the last map with its averages over 1, 4, 9 and 36 parts in it, `[B, h, w, channels]`."""
        size = size_of(x)
        pools = (
            resize(conv(adaptive_average_pool(x, scale)), size)
            for scale, conv in zip(POOL_SCALES, self.psp_modules, strict=True)
        )
        parts = [x, *pools]
        dtype = parts[-1].dtype  # the convolutions' dtype; x may be float32
        return self.bottleneck(jnp.concatenate([part.astype(dtype) for part in parts], axis=-1))


class FCNHead(nnx.Module):
    """The auxiliary head, used only in training: a 3 x 3 ConvModule of one map.

    Source: mmseg's `FCNHead` (num_convs=1, concat_input=False).
    """

    def __init__(
        self,
        width: int,
        channels: int,
        num_classes: int,
        *,
        dropout_index: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.convs = nnx.List([ConvModule(width, channels, 3, dtype=dtype, rngs=rngs)])
        self.classifier = Classifier(channels, num_classes, dropout_index=dropout_index, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map, keys: jax.Array | None = None) -> Float[Array, "B H W classes"]:
        """Returns float32 logits at the size of the map; `keys` as for `UPerHead`."""
        return self.classifier(self.convs[0](x), keys)


class Upsample2x(nnx.Module):
    """Transposed convolution, 2 x 2 with stride 2: every pixel becomes four.

    Its windows do not overlap, so it is one matrix product; XLA's transposed convolution is many times slower on a CPU.

    Source: torch.nn.ConvTranspose2d(D, D, kernel_size=2, stride=2) and its initial values.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        start = init.uniform((4 * width) ** -0.5)
        self.kernel = nnx.Param(start(rngs.params(), (width, 2, 2, width)))
        self.bias = nnx.Param(start(rngs.params(), (width,)))

    def __call__(self, x: Map) -> Resized:
        """Maps `[B, H, W, D]` to `[B, 2 H, 2 W, D]`."""
        batch, height, width, channels = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.einsum("bhwd,dijo->bhiwjo", x.astype(self.dtype), kernel)
        y = y.reshape(batch, 2 * height, 2 * width, channels)
        return y + self.bias[...].astype(self.dtype)[None, None, None, :]


class VimNeck(nnx.Module):
    """Makes a pyramid of ViM's four maps, which have one size: 4, 2, 1 and 1/2 times as large for patches of 16.

    With patches of 8 the factors are 2, 1, 1/2 and 1/4, as in the official code. Any other patch size has the factors
    of 16.

    Source: hustvl/Vim, seg/backbone/vim.py (`fpn1` to `fpn4`).
    """

    def __init__(self, width: int, patch_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.halvings = (1, 2) if patch_size == 8 else (0, 1)  # for the third and the fourth map
        self.up1 = Upsample2x(width, dtype=dtype, rngs=rngs)
        coarse = patch_size != 8
        self.bn = nnx.data(BatchNorm(width) if coarse else None)
        self.up1_again = nnx.data(Upsample2x(width, dtype=dtype, rngs=rngs) if coarse else None)
        self.up2 = nnx.data(Upsample2x(width, dtype=dtype, rngs=rngs) if coarse else None)

    def __call__(self, maps: Sequence[Map]) -> tuple[AnyMap, ...]:
        """Maps four `[B, h, w, D]` to four of other sizes, finest first."""
        first, second, third, fourth = maps
        first = self.up1(first)
        if self.bn is not None and self.up1_again is not None and self.up2 is not None:
            first = self.up1_again(jax.nn.gelu(self.bn(first), approximate=False))
            second = self.up2(second)
        return first, second, _max_pooled(third, self.halvings[0]), _max_pooled(fourth, self.halvings[1])


def _max_pooled(x: Map, halvings: int) -> Resized:
    """Takes the largest value of each square of 2^halvings pixels a side; incomplete squares are left out."""
    side = 2**halvings
    batch, rows, columns, channels = x.shape[0], x.shape[1] // side, x.shape[2] // side, x.shape[3]
    whole = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
    return jnp.max(whole, axis=(2, 4)) if halvings else x
