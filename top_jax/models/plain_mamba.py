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

from top_jax.errors import InputError
from top_jax.models import initializers as init
from top_jax.models.backbone import Backbone, Block, make_head
from top_jax.models.depthwise_conv import convolve_tokens
from top_jax.models.features import Features
from top_jax.models.layers import BatchNorm, DropPath, layer_norm
from top_jax.models.resizing import resize
from top_jax.models.sizes import MambaConfig
from top_jax.models.traversals import DIRECTIONS, Traversals, traverse
from top_jax.ops import ScanArguments, ScanPlan, directional_scan
from top_jax.ops.alignment import gaps
from top_jax.pruning import SCAN_EVIDENCE, Evidence, Reduction, Tokens, mean_time_step, scan_evidence
from top_jax.typing import Array, Embedded, Float, Images, Inner, PerChannel, PerToken
from top_jax.values import refused, several, whole

STEM_WIDTH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainMambaConfig(MambaConfig):
    """Sizes of a PlainMamba, in addition to those of `MambaConfig`.

    Attributes:
        img_size: any size; the stem pads an incomplete last patch with zeros.
        patch_size: even, because the stem halves the image before it cuts patches of P / 2; so is the stride.
        d_conv: side of the depthwise convolution on the grid, odd.
        num_convs_patch_embed: number of 3 x 3 convolutions in the stem.
        layers_with_dwconv: indices, from 0, of the blocks that end in a 3 x 3 depthwise convolution.
        reorder_parameters: whether delta, B and C follow each traversal as u does. False, the default, is what the
            official code does and its checkpoints are trained with (`PlainMambaMixer`).

    Raises:
        InputError: a value out of range.
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
        whole("num_convs_patch_embed", self.num_convs_patch_embed, 0)
        needed = f"blocks from 0 to {self.depth - 1}, such as (0,)"
        layers = several("layers_with_dwconv", self.layers_with_dwconv, needed)
        try:
            layers = tuple(whole("block", layer, 0, self.depth - 1) for layer in layers)
        except InputError:
            raise refused("layers_with_dwconv", self.layers_with_dwconv, needed) from None
        object.__setattr__(self, "layers_with_dwconv", layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid_of(self.img_size)

    def grid_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image of (height, width)."""
        rows, columns = (-(-side // self.stride) for side in img_size)  # the stem rounds up, twice
        return rows, columns


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
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, 64]`."""
        return jax.nn.relu(self.norm(self.conv(x)))


class ConvPatchEmbed(nnx.Module):
    """A 7 x 7 convolution that halves the image, 3 x 3 convolutions, then a projection of patches of P / 2.

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
        """Maps `[B, H, W, 3]` to `[B, M, D]`, patches in raster order."""
        height, width = images.shape[1:3]
        x = self.stem(images)
        for conv in self.convs:
            x = conv(x)
        side, stride = self.config.patch_size // 2, self.config.stride // 2
        missing = (
            max((count - 1) * stride + side - size, 0)
            for count, size in zip(self.config.grid_of((height, width)), x.shape[1:3], strict=True)
        )
        below, right = missing
        x = self.proj(jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))))
        return rearrange(x, "b rows columns d -> b (rows columns) d")


class PlainMambaMixer(nnx.Module):
    """in_proj -> (x, z); x convolved on the grid; y = sum of four scans, gated by SiLU(z); out_proj(y).

    We keep two quirks of the official code, because its checkpoints are trained with them:

    * In each traversal only u is put into the traversal's order; delta, B and C stay in raster order. Step i scans u
      of the token that it visits with the parameters of raster token i. `reorder_parameters=True` is the corrected
      form, for models trained here.
    * dt_proj's bias is added twice: in the projection, and again before softplus.

    Source: ChenhongyiYang/PlainMamba, plain_mamba_layer.py, `PlainMamba2D`.
    """

    def __init__(self, config: PlainMambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner, states, taps = config.embed_dim, config.inner_dim, config.d_state, config.d_conv
        self.in_proj = _linear(width, 2 * inner, config, rngs)
        bound = init.uniform(1 / taps)  # 1 / sqrt(taps * taps)
        self.conv_kernel = nnx.Param(bound(rngs.params(), (taps, taps, inner)))
        self.conv_bias = nnx.Param(bound(rngs.params(), (inner,)))
        self.x_proj = _linear(inner, config.dt_rank + 2 * states, config, rngs, use_bias=False)
        self.dt_proj = _linear(config.dt_rank, inner, config, rngs)
        self.A_log = nnx.Param(init.a_log(inner, states))
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32))
        self.direction_Bs = nnx.Param(init.trunc_normal(rngs.params(), (DIRECTIONS + 1, states)))
        self.out_proj = _linear(inner, width, config, rngs)

    def __call__(self, x: Embedded, paths: Traversals) -> tuple[Embedded, Evidence]:
        """Mixes `[B, L, D]`; also returns the evidence for token scores (`top_jax.pruning.scan_evidence`)."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        scan = self._project(x, paths)
        y, _ = directional_scan(
            scan.u,
            scan.delta,
            scan.A,
            scan.B,
            scan.C,
            scan.D,
            z,
            scan.delta_bias,
            reverse=self.plan.reverse,
            order=scan.order,
            reorder_parameters=self.plan.reorder_parameters,
            positions=paths.positions,
            alignment="none" if paths.positions is None else "decay",
            implementation=self.config.implementation,
            check_order=False,  # valid by construction: the model computes the order and the positions
        )
        time_step = mean_time_step(scan.delta[0], self.dt_bias)
        return self.out_proj(y), scan_evidence(y, self._time_step(time_step, paths))

    @property
    def plan(self) -> ScanPlan:
        """The four scans' directions; `paths.order` reverses, so no scan runs backwards."""
        return ScanPlan((False,) * DIRECTIONS, self.config.reorder_parameters)

    @property
    def dt_bias(self) -> PerChannel:
        """float32 `[E]` bias of dt_proj, which the scan adds to delta once more."""
        assert self.dt_proj.bias is not None
        return self.dt_proj.bias[...]

    def scan_arguments(self, x: Embedded, paths: Traversals) -> tuple[ScanArguments, ScanPlan]:
        """Returns the arguments of the four scans that `__call__` runs for x and paths, and their plan."""
        scan = self._project(jnp.split(self.in_proj(x), 2, axis=-1)[0], paths)
        gap = None if paths.positions is None else gaps(paths.positions, self.plan.reverse)
        return scan._replace(gap=gap), self.plan

    def _project(self, x: Inner, paths: Traversals) -> ScanArguments:
        """Returns the arguments of the four scans for x `[B, L, E]`, without gaps."""
        x = jax.nn.silu(self._convolved(x, paths))
        rank = self.config.dt_rank
        dt, B, C = jnp.split(self.x_proj(x), (rank, rank + self.config.d_state), axis=-1)
        return ScanArguments(
            x[None],
            self.dt_proj(dt)[None],
            -jnp.exp(self.A_log[...])[None],
            B[None].astype(jnp.float32) + self._direction_B(paths),  # bfloat16 would lose much of 0.02 added to 1
            C[None],
            self.D[...][None],
            self.dt_bias[None],
            order=paths.order,
        )

    def _convolved(self, x: Inner, paths: Traversals) -> Inner:
        x = convolve_tokens(x, self.conv_kernel[...].astype(x.dtype), paths)
        return x + self.conv_bias[...].astype(x.dtype)[None, None, :]

    def _direction_B(self, paths: Traversals) -> Float[Array, "4 B L N"]:
        """Returns the direction vector of each step's move, by a product, whose gradient sums in a fixed order."""
        chosen = jax.nn.one_hot(paths.moves, DIRECTIONS + 1, dtype=jnp.float32)
        return jnp.einsum("gblm,mn->gbln", chosen, self.direction_Bs[...], precision=jax.lax.Precision.HIGHEST)

    def _time_step(self, mean: PerToken, paths: Traversals) -> PerToken:
        """Sums, for each token, the time steps with which the four scans read it; `mean` is in raster order."""
        if self.config.reorder_parameters:
            return DIRECTIONS * mean
        step_of_token = jnp.argsort(paths.order, axis=-1)
        return jnp.sum(jnp.take_along_axis(mean[None], step_of_token, axis=-1), axis=0)


class DepthwiseTail(nnx.Module):
    """3 x 3 depthwise convolution -> BatchNorm -> exact GELU; replaces the stream, there is no skip connection."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init.uniform(1 / 3)(rngs.params(), (3, 3, width)))
        self.norm = BatchNorm(width)

    def __call__(self, x: Embedded, paths: Traversals) -> Embedded:
        """Maps `[B, L, D]` to `[B, L, D]`; the statistics are taken over the tokens that are left."""
        x = convolve_tokens(x, self.kernel[...].astype(x.dtype), paths)
        return jax.nn.gelu(self.norm(x), approximate=False)


class PlainMambaLayer(Block):
    """x + mixer(LayerNorm(x)), followed in some layers by a `DepthwiseTail`."""

    def __init__(self, config: PlainMambaConfig, index: int, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = layer_norm(config.embed_dim, 1e-5, rngs)
        self.mixer = PlainMambaMixer(config, rngs=rngs)
        self.drop_path = DropPath(config.drop_path_rate(index), index)
        self.tail = DepthwiseTail(config.embed_dim, rngs=rngs) if index in config.layers_with_dwconv else None

    def mix(self, tokens: Tokens, paths: Traversals, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """Runs the whole layer."""
        mixed, evidence = self.mixer(self._normed(tokens), paths)
        x = tokens.x + self.drop_path(mixed, keys).astype(jnp.float32)
        if self.tail is not None:
            x = self.tail(x, paths)
        return dataclasses.replace(tokens, x=x), evidence

    def scan_arguments(self, tokens: Tokens, paths: Traversals) -> tuple[ScanArguments, ScanPlan]:
        """Returns the arguments of the four scans in `mix`, and their plan."""
        return self.mixer.scan_arguments(self._normed(tokens), paths)

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
        self.head = nnx.data(make_head(config, rngs))

    def embed(self, images: Images) -> Tokens:
        """Returns the patches, position embedding added; the stream is float32."""
        grid = self.config.grid_of((images.shape[1], images.shape[2]))
        x = self.patch_embed(images).astype(jnp.float32) + self._positions(grid)
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        positions = jnp.broadcast_to(places, x.shape[:2])
        return Tokens(x=x, residual=None, positions=positions, cls_index=None, grid=grid)

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "1 M D"]:
        """Returns the position embedding of a grid: the model's own, resized if the grids differ."""
        if grid == self.config.grid:
            return self.pos_embed[...]
        embedding = self.pos_embed[...].reshape(1, *self.config.grid, -1)
        return resize(embedding, grid, "bicubic").reshape(1, grid[0] * grid[1], -1)

    def paths(self, tokens: Tokens) -> Traversals:
        """Returns the four traversals of the tokens of a stage."""
        grid = tokens.grid or self.config.grid
        return traverse(tokens.positions, grid, self.reduction.alignment, by_token=self.config.reorder_parameters)

    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """Applies the final norm."""
        return self.norm(tokens.x)

    def pool(self, features: Features) -> Float[Array, "B D"]:
        """Returns the mean over the tokens that are left; a merged token is weighted by its number of patches.

        Source of the weights: facebookresearch/ToMe, tome/patch/mae.py (for a ViT with mean pooling).
        """
        if features.size is None:
            return jnp.mean(features.x, axis=1)
        return jnp.sum(features.x * features.size[:, :, None], axis=1) / jnp.sum(features.size, axis=1, keepdims=True)


class DensePlainMamba(PlainMamba):
    """A PlainMamba that returns feature maps (`Features.stages`) for images of any size.

    The position embedding keeps the grid of `img_size`, and is resized (bicubic) to that of each call.

    Source: ChenhongyiYang/PlainMamba, downstream/mmsegmentation/mmseg/models/backbones/plain_mamba_seg.py.
    """

    ANY_SIZE: ClassVar = True


def _linear(
    inputs: int, outputs: int, config: PlainMambaConfig, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """Returns a projection computed in the model's dtype, initialised as in the official training configs.

    They initialise *every* linear layer this way, including dt_proj: mmcls applies `init_cfg` after the layer's own
    initialisation.
    """
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=config.dtype, kernel_init=init.trunc_normal, rngs=rngs)
