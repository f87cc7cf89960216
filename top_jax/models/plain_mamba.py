"""PlainMamba, arXiv 2403.17695, with token reduction between blocks.

    images -> convolutional stem + position -> [layer] * depth, reduced after some -> norm -> mean over tokens -> head

Source: ChenhongyiYang/PlainMamba, mmcls/plain_mamba_dev/models/plain_mamba, with mmcls's LinearClsHead.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from top_jax.models import initializers as init
from top_jax.models.backbone import Backbone, Block
from top_jax.models.batch_norm import BatchNorm
from top_jax.models.depthwise_conv import depthwise_conv2d
from top_jax.models.features import Features
from top_jax.models.layers import DropPath, layer_norm
from top_jax.models.plain_mamba_config import PlainMambaConfig
from top_jax.models.plain_mamba_mixer import PlainMambaMixer
from top_jax.models.scan_inputs import ScanInputs
from top_jax.models.traversals import Traversals, from_cells, to_cells, traverse
from top_jax.pruning import SCAN_EVIDENCE, Evidence, Reduction, Tokens
from top_jax.typing import Array, Embedded, Float, Images

STEM_WIDTH = 64


class ConvBatchNorm(nnx.Module):
    """Convolution -> BatchNorm -> ReLU."""

    def __init__(self, inputs: int, side: int, stride: int, config: PlainMambaConfig, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs,
            STEM_WIDTH,
            kernel_size=(side, side),
            strides=stride,
            padding=side // 2,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=init.uniform_fan_in_conv,
            rngs=rngs,
        )
        self.norm = BatchNorm(STEM_WIDTH)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B rows columns width"]:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, 64]`."""
        return jax.nn.relu(self.norm(self.conv(x)))


class ConvPatchEmbed(nnx.Module):
    """7 x 7 convolution that halves the image, 3 x 3 convolutions, then patches of P / 2.

    Source: mmcls/plain_mamba_dev/models/modules/patch_embed.py (padding "corner").
    """

    def __init__(self, config: PlainMambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = ConvBatchNorm(3, 7, 2, config, rngs=rngs)
        self.convs = nnx.List(
            [ConvBatchNorm(STEM_WIDTH, 3, 1, config, rngs=rngs) for _ in range(config.num_convs_patch_embed)]
        )
        side, stride = config.patch_size // 2, config.stride // 2
        self.proj = nnx.Conv(
            STEM_WIDTH,
            config.embed_dim,
            kernel_size=(side, side),
            strides=stride,
            padding="VALID",
            dtype=config.dtype,
            kernel_init=init.uniform_fan_in_conv,
            bias_init=init.uniform((STEM_WIDTH * side * side) ** -0.5),
            rngs=rngs,
        )

    def __call__(self, images: Images) -> Float[Array, "B M D"]:
        """`[B, H, W, 3]` to `[B, M, D]`, patches in raster order."""
        x = self.stem(images)
        for conv in self.convs:
            x = conv(x)
        side, stride = self.config.patch_size // 2, self.config.stride // 2
        missing = (
            max((count - 1) * stride + side - size, 0)
            for count, size in zip(self.config.grid, x.shape[1:3], strict=True)
        )
        below, right = missing
        x = self.proj(jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))))
        return rearrange(x, "b rows columns d -> b (rows columns) d")


class DepthwiseTail(nnx.Module):
    """3 x 3 depthwise convolution -> BatchNorm -> exact GELU, in place of the stream and not beside it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init.uniform(1 / 3)(rngs.params(), (3, 3, width)))
        self.norm = BatchNorm(width)

    def __call__(self, x: Embedded, paths: Traversals) -> Embedded:
        """`[B, L, D]`; the statistics are those of the tokens that are there."""
        x = from_cells(depthwise_conv2d(to_cells(x, paths), self.kernel[...].astype(x.dtype)), paths)
        return jax.nn.gelu(self.norm(x), approximate=False)


class PlainMambaLayer(Block):
    """x + mixer(LayerNorm(x)), and in some layers a convolution at the end."""

    def __init__(self, config: PlainMambaConfig, index: int, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = layer_norm(config.embed_dim, 1e-5, rngs)
        self.mixer = PlainMambaMixer(config, rngs=rngs)
        self.drop_path = DropPath(config.drop_path_rate(index), index)
        self.tail = DepthwiseTail(config.embed_dim, rngs=rngs) if index in config.layers_with_dwconv else None

    def mix(self, tokens: Tokens, paths: Traversals, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """The whole layer."""
        mixed, evidence = self.mixer(self._normed(tokens), paths)
        x = tokens.x + self.drop_path(mixed, keys).astype(jnp.float32)
        if self.tail is not None:
            x = self.tail(x, paths)
        return dataclasses.replace(tokens, x=x), evidence

    def scan_inputs(self, tokens: Tokens, paths: Traversals) -> ScanInputs:
        """Of the four scans."""
        return self.mixer.scan_inputs(self._normed(tokens), paths)

    def _normed(self, tokens: Tokens) -> Embedded:
        return self.norm(tokens.x).astype(self.config.dtype)


class PlainMamba(Backbone):
    """A PlainMamba classifier."""

    EVIDENCE: ClassVar = SCAN_EVIDENCE

    def __init__(self, config: PlainMambaConfig, pruning: Reduction | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, pruning)
        width = config.embed_dim
        self.patch_embed = ConvPatchEmbed(config, rngs=rngs)
        self.pos_embed = nnx.Param(init.trunc_normal(rngs.params(), (1, config.num_patches, width)))
        self.blocks = nnx.List([PlainMambaLayer(config, i, rngs=rngs) for i in range(config.depth)])
        self.norm = layer_norm(width, 1e-6, rngs)
        self.head = nnx.Linear(width, config.num_classes, dtype=config.dtype, kernel_init=init.trunc_normal, rngs=rngs)

    def embed(self, images: Images) -> Tokens:
        """Patches with their position embedding; the stream is float32."""
        x = self.patch_embed(images).astype(jnp.float32) + self.pos_embed[...]
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        return Tokens(x=x, residual=None, positions=jnp.broadcast_to(places, x.shape[:2]), cls_index=None)

    def paths(self, tokens: Tokens) -> Traversals:
        """The four traversals of the tokens of a stage."""
        return traverse(
            tokens.positions, self.config.grid, self.pruning.alignment, by_token=self.config.reorder_parameters
        )

    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """The final norm."""
        return self.norm(tokens.x)

    def pool(self, features: Features) -> Float[Array, "B D"]:
        """The mean over the tokens that are left; merged ones count once for each of their patches.

        Source of the weights: facebookresearch/ToMe, tome/patch/mae.py (a ViT that is pooled so).
        """
        if features.size is None:
            return jnp.mean(features.x, axis=1)
        return jnp.sum(features.x * features.size[:, :, None], axis=1) / jnp.sum(features.size, axis=1, keepdims=True)
