"""Vision Mamba (ViM), arXiv 2401.09417, with token reduction between blocks.

    images -> patches + class token + position -> [block] * depth, reduced after some -> norm -> class token -> head

Source: hustvl/Vim, vim/models_mamba.py, `VisionMamba` (rms_norm, residual_in_fp32, bimamba_type="v2",
if_divide_out, use_middle_cls_token).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.errors import InputError
from top_jax.models import initializers as init
from top_jax.models.backbone import Backbone, Block, make_head
from top_jax.models.features import Features
from top_jax.models.layers import DropPath, PatchEmbed, causal_conv1d, patch_grid
from top_jax.models.sizes import MambaConfig
from top_jax.ops import ScanArguments, ScanPlan, selective_scan
from top_jax.ops.alignment import gaps
from top_jax.pruning import SCAN_EVIDENCE, ClassHome, Evidence, Reduction, Tokens, mean_time_step, scan_evidence
from top_jax.typing import (
    Array,
    Embedded,
    Float,
    Images,
    Inner,
    PerToken,
    Positions,
    Selective,
    StateMatrix,
)
from top_jax.values import one_of

VIM_VARIANTS: Final = ("residual", "official_tiny", "official_small")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VimConfig(MambaConfig):
    """Sizes of a ViM, those of `MambaConfig`. The convolution before each scan is causal.

    Raises:
        InputError: a value out of range, or an image that patches and stride do not tile.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        patch_grid(self.img_size, self.patch_size, self.stride)  # raises if the sizes do not fit

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.img_size, self.patch_size, self.stride)

    @property
    def halved(self) -> bool:
        """Whether the two directions are averaged instead of added."""
        return True

    def drop_path_rate(self, index: int) -> float:
        """Returns the official rate of block `index` (from 0): ([0] + linspace(0, drop_path, depth))[index]."""
        return 0.0 if index == 0 or self.depth == 1 else self.drop_path * (index - 1) / (self.depth - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseVimConfig(VimConfig):
    """Sizes of a ViM that returns feature maps, in addition to those of `VimConfig`. It has no class token.

    Attributes:
        variant: which official segmentation model it follows (`DenseVim`), one of `VIM_VARIANTS`.

    Raises:
        InputError: a value out of range, an unknown variant, or, with rotary embeddings, an embed_dim that is not a
            multiple of 4.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = None

    variant: str = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, VIM_VARIANTS)
        if self.variant == "official_small" and self.embed_dim % 4:
            raise InputError(
                f"embed_dim={self.embed_dim} with variant='official_small', which rotates pairs of channels by row and "
                "by column; needed: a multiple of 4."
            )

    @property
    def halved(self) -> bool:
        """Whether the two directions are averaged; `official_small` adds them."""
        return self.variant != "official_small"


class ScanDirection(nnx.Module):
    """One scan direction, with its own convolution over the tokens that are left, projections, A and D."""

    def __init__(self, config: VimConfig, *, reverse: bool, rngs: nnx.Rngs):
        self.config = config
        self.reverse = reverse
        width, rank, states = config.inner_dim, config.dt_rank, config.d_state
        taps = init.uniform(config.d_conv**-0.5)
        self.conv_kernel = nnx.Param(taps(rngs.params(), (config.d_conv, width)))
        self.conv_bias = nnx.Param(taps(rngs.params(), (width,)))
        self.x_proj = _linear(width, rank + 2 * states, init.uniform_fan_in, config, rngs)
        self.dt_proj = _linear(rank, width, init.uniform(rank**-0.5), config, rngs)
        # In the official code, only the forward direction starts with Mamba's dt bias; the backward one starts at zero.
        start = jnp.zeros((width,), jnp.float32) if reverse else init.dt_bias(rngs.params(), (width,))
        self.dt_bias = nnx.Param(start)
        self.A_log = nnx.Param(init.a_log(width, states))
        self.D = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Inner, positions: Positions | None) -> tuple[Inner, PerToken]:
        """Convolves and scans the in-projected tokens; `MambaMixer` gates the sum of the directions.

        Returns:
            y `[B, L, E]` in image order, and each token's mean time step, float32 `[B, L]`.
        """
        u, delta, B, C = self.project(x)
        y = selective_scan(
            u,
            delta,
            self.A,
            B,
            C,
            self.D[...],
            delta_bias=self.dt_bias[...],
            positions=positions,
            alignment="none" if positions is None else "decay",
            reverse=self.reverse,
            implementation=self.config.implementation,
            check_order=False,  # valid by construction: the model computes the positions
        )
        return y, mean_time_step(delta, self.dt_bias[...])

    @property
    def A(self) -> StateMatrix:
        """Decay rates, float32 `[E, N]`."""
        return -jnp.exp(self.A_log[...])

    def project(self, x: Inner) -> tuple[Inner, Inner, Selective, Selective]:
        """Returns u and delta `[B, L, E]`, B and C `[B, L, N]` for the in-projected tokens."""
        x = causal_conv1d(x, self.conv_kernel[...], self.conv_bias[...], reverse=self.reverse)
        x = jax.nn.silu(x)
        rank = self.config.dt_rank
        dt, B, C = jnp.split(self.x_proj(x), (rank, rank + self.config.d_state), axis=-1)
        return x, self.dt_proj(dt), B, C


class MambaMixer(nnx.Module):
    """in_proj -> (x, z); y = forward(x) + backward(x), gated by SiLU(z); out_proj(y / 2).

    Source: hustvl/Vim, mamba-1p1p1/mamba_ssm/modules/mamba_simple.py, `Mamba` with bimamba_type="v2" and
    if_divide_out=True.
    """

    def __init__(self, config: VimConfig, *, rngs: nnx.Rngs):
        width, inner = config.embed_dim, config.inner_dim
        self.halved = config.halved
        self.in_proj = _linear(width, 2 * inner, init.uniform_fan_in, config, rngs)
        self.forward = ScanDirection(config, reverse=False, rngs=rngs)
        self.backward = ScanDirection(config, reverse=True, rngs=rngs)
        self.out_proj = _linear(inner, width, init.residual_out(config.depth), config, rngs)

    def __call__(self, x: Embedded, positions: Positions | None) -> tuple[Embedded, Evidence]:
        """Mixes `[B, L, D]`; also returns the evidence for token scores (`top_jax.pruning.scan_evidence`).

        Args:
            x: `[B, L, D]`, after the norm.
            positions: int32 `[B, L]` with `decay`, whose scan needs the gaps; else None.
        """
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        (forward, forward_step), (backward, backward_step) = self.forward(x, positions), self.backward(x, positions)
        y = (forward + backward) * jax.nn.silu(z)
        return self.out_proj(y / 2 if self.halved else y), scan_evidence(y, forward_step + backward_step)

    def scan_arguments(self, x: Embedded, positions: Positions | None) -> tuple[ScanArguments, ScanPlan]:
        """Returns the arguments of the two scans that `__call__` runs for x and positions, and their plan."""
        x, _ = jnp.split(self.in_proj(x), 2, axis=-1)
        directions = (self.forward, self.backward)
        plan = ScanPlan(tuple(one.reverse for one in directions))
        u, delta, B, C = (jnp.stack(both) for both in zip(*(one.project(x) for one in directions), strict=True))
        arguments = ScanArguments(
            u,
            delta,
            jnp.stack([one.A for one in directions]),
            B,
            C,
            jnp.stack([one.D[...] for one in directions]),
            jnp.stack([one.dt_bias[...] for one in directions]),
            None if positions is None else gaps(positions[None], plan.reverse),
        )
        return arguments, plan


class VimBlock(Block):
    """Add -> RMSNorm -> Mixer, on the pair (hidden, residual)."""

    def __init__(self, config: VimConfig, index: int, *, rngs: nnx.Rngs):
        self.drop_path = DropPath(config.drop_path_rate(index), index)
        self.norm = nnx.RMSNorm(config.embed_dim, epsilon=1e-5, rngs=rngs)
        self.mixer = MambaMixer(config, rngs=rngs)

    def mix(self, tokens: Tokens, paths: Positions | None, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """Runs the whole block; `paths` are the tokens' positions with `decay`, else None."""
        residual, x = self._add_and_norm(tokens, keys)
        x, evidence = self.mixer(x, paths)
        return dataclasses.replace(tokens, x=x, residual=residual), evidence

    def scan_arguments(self, tokens: Tokens, paths: Positions | None) -> tuple[ScanArguments, ScanPlan]:
        """Returns the arguments of the two scans in `mix`, and their plan."""
        return self.mixer.scan_arguments(self._add_and_norm(tokens, None)[1], paths)

    def added(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """Returns the residual stream `[B, L, D]` at the start of the block: the tokens' residual plus their x."""
        assert tokens.residual is not None
        return tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32)

    def _add_and_norm(self, tokens: Tokens, keys: jax.Array | None) -> tuple[Embedded, Embedded]:
        residual = self.added(tokens, keys)
        return residual, self.norm(residual).astype(tokens.x.dtype)


class Vim(Backbone):
    """A ViM classifier, or, with a `DenseVimConfig`, its blocks without a class token."""

    EVIDENCE: ClassVar = SCAN_EVIDENCE

    def __init__(self, config: VimConfig, pruning: Reduction | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, pruning)
        width = config.embed_dim
        self.patch_embed = PatchEmbed(width, config.patch_size, config.stride, dtype=config.dtype, rngs=rngs)
        has_class = config.CLASS_TOKEN is not None
        cls_token = nnx.Param(init.trunc_normal(rngs.params(), (1, 1, width))) if has_class else None
        self.cls_token = nnx.data(cls_token)
        self.pos_embed = nnx.Param(init.trunc_normal(rngs.params(), (1, config.num_patches + has_class, width)))
        self.blocks = nnx.List([VimBlock(config, i, rngs=rngs) for i in range(config.depth)])
        self.drop_path = DropPath(config.drop_path, config.depth)
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.data(make_head(config, rngs))

    def embed(self, images: Images) -> Tokens:
        """Returns the patches, with the class token in their middle if there is one, position embedding added."""
        x = self.patch_embed(images)
        batch, num_patches, width = x.shape
        middle = num_patches // 2
        if self.cls_token is not None:
            cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (batch, 1, width))
            x = jnp.concatenate([x[:, :middle], cls, x[:, middle:]], axis=1)
        x = x + self.pos_embed[...].astype(x.dtype)
        return Tokens(
            x=x,
            residual=jnp.zeros(x.shape, jnp.float32),
            positions=jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2]),
            cls_index=None if self.cls_token is None else jnp.full((batch,), middle, jnp.int32),
            grid=self.config.grid,
        )

    def paths(self, tokens: Tokens) -> Positions | None:
        """Returns the tokens' positions with `decay`. `hold` only needs the original order, which the tokens have."""
        return tokens.positions if self.reduction.alignment == "decay" else None

    def stream(self, tokens: Tokens) -> Embedded:
        """Adds the hidden state to the residual, as the next block would."""
        assert tokens.residual is not None
        return tokens.residual + tokens.x.astype(jnp.float32)

    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """Applies the final Add, with the last drop-path, and the final norm."""
        assert tokens.residual is not None
        return self.norm(tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32))

    def pool(self, features: Features) -> Float[Array, "B D"]:
        """Returns the class token."""
        assert features.cls is not None  # every ViM classifier has one
        return features.cls


class DenseVim(Vim):
    """A ViM that returns feature maps (`Features.stages`), in one of three official variants.

    The official configs of ViM-T and ViM-S differ in more than their sizes, and neither agrees with the pre-trained
    classifiers in everything. The classifier has no rotary embedding, averages its two directions, and passes on the
    sum of its hidden state and the residual stream.

        variant          a map holds                                 rotary embedding   the two directions are
        residual         the residual stream                         none               averaged
        official_tiny    the mixer's output, without that stream     none               averaged
        official_small   the residual stream, rotated                before each block  added

    `residual` is the default: it is the classifier itself, so pre-trained weights keep their meaning. The others load
    official segmentation files. The maps of `official_small`, except the last, are rotated once more than their block,
    because the official code takes them inside the next block. For the same reason the drop-path of the next block
    applies to a map in train mode, except for `official_tiny`. No variant has a class token. In the official
    `official_tiny` the residual stream has the dtype of the computation; ours is always float32.

    Source: hustvl/Vim, seg/backbone/vim.py and seg/configs/vim/upernet, at a3ac48e.
    """

    def before_block(self, tokens: Tokens) -> Tokens:
        """Rotates hidden state and residual stream by the token's row and column, for `official_small`."""
        if self.config.variant != "official_small":
            return tokens
        assert tokens.residual is not None
        cos, sin = (jnp.asarray(table) for table in rotary_tables(self.config.grid, self.config.embed_dim))
        nowhere = tokens.positions[:, :, None] < 0
        place = jnp.maximum(tokens.positions, 0)
        cos, sin = jnp.where(nowhere, 1.0, cos[place]), jnp.where(nowhere, 0.0, sin[place])
        x = _rotated(tokens.x.astype(jnp.float32), cos, sin).astype(tokens.x.dtype)
        return dataclasses.replace(tokens, x=x, residual=_rotated(tokens.residual, cos, sin))

    def map_value(self, tokens: Tokens, number: int, keys: jax.Array | None) -> Embedded:
        """Returns the variant's map after block `number`, float32 `[B, L, D]`."""
        if self.config.variant == "official_tiny":
            return tokens.x.astype(jnp.float32)
        if number == self.config.depth:
            return self.stream(tokens)
        block = self.blocks[number]  # the next one: numbers count from 1
        assert isinstance(block, VimBlock)
        return block.added(self.before_block(tokens), keys)


@functools.cache
def rotary_tables(grid: tuple[int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of the angle of each patch and channel, float32 `[M, D]`.

    The first half of the channels is rotated by the row, the second half by the column, in pairs of channels. The grid
    is stretched to the 14 x 14 of the pre-trained models.

    Source: hustvl/Vim, vim/rope.py, `VisionRotaryEmbeddingFast` (pt_seq_len 14, theta 10,000).
    """
    half, one = width // 2, np.float32(1)
    frequencies = one / np.float32(10_000) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))

    def angles(count: int) -> np.ndarray:
        places = np.arange(count, dtype=np.float32) / np.float32(count) * np.float32(14)
        return np.repeat(places[:, None] * frequencies[None, :], 2, axis=1)

    shape = (*grid, half)
    rows, columns = np.broadcast_to(angles(grid[0])[:, None], shape), np.broadcast_to(angles(grid[1])[None], shape)
    table = np.concatenate([rows, columns], axis=-1).reshape(-1, width)
    return np.cos(table), np.sin(table)


def _rotated(x: Embedded, cos: Embedded, sin: Embedded) -> Embedded:
    """Rotates each pair of channels."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def _linear(inputs: int, outputs: int, kernel_init: init.Initializer, config: VimConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a projection without bias, computed in the model's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, kernel_init=kernel_init, rngs=rngs)
