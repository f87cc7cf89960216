"""DeiT, arXiv 2012.12877, with token reduction inside its blocks: the transformer of the EViT and ToMe papers.

    images -> class token + patches + position -> [attention -> reduce -> MLP] * depth -> norm -> class token -> head

Source: facebookresearch/deit (timm 0.3.2's `VisionTransformer`), and youweiliang/evit, evit.py, for the reduction
between a block's attention and its MLP.
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
from top_jax.models.features import Features
from top_jax.models.layers import DropPath, PatchEmbed, layer_norm
from top_jax.models.sizes import BackboneConfig
from top_jax.pruning import ClassHome, Evidence, Reduction, Tokens
from top_jax.typing import Array, Embedded, Float, Images, PerToken
from top_jax.values import LARGEST_COUNT, refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeitConfig(BackboneConfig):
    """Sizes of a DeiT, in addition to those of `BackboneConfig`.

    Attributes:
        img_size: (height, width), multiples of patch_size.
        num_heads: attention heads, each D / num_heads wide.
        mlp_ratio: width of the MLP divided by D.

    Raises:
        InputError: a value out of range, or sizes that do not fit together.
    """

    CLASS_TOKEN: ClassVar[ClassHome | None] = "first"

    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.embed_dim * self.mlp_ratio <= LARGEST_COUNT:
            raise refused("mlp_ratio", self.mlp_ratio, "above 0, such as 4")
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
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)


class Attention(nnx.Module):
    """Softmax attention of every token to every token.

    `jax.nn.dot_product_attention` cannot be used: it does not return the class token's attention.
    """

    def __init__(self, config: DeitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.qkv = _linear(config.embed_dim, 3 * config.embed_dim, config, rngs)
        self.proj = _linear(config.embed_dim, config.embed_dim, config, rngs)

    def __call__(self, x: Embedded, size: PerToken | None) -> tuple[Embedded, PerToken]:
        """Mixes tokens `[B, L, D]`.

        Args:
            x: tokens after the norm, the class token first.
            size: float32 `[B, L]` number of patches that each token stands for, or None for one each. A token of n
                patches gets the attention of n equal ones: log n is added to its logit (arXiv 2210.09461, section 3).

        Returns:
            `[B, L, D]`, and float32 `[B, L]`: the class token's attention to each token, averaged over the heads.
        """
        weights, v = self.weights(x, size)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
        return self.proj(rearrange(mixed, "b h l d -> b l (h d)")), jnp.mean(weights[:, :, 0], axis=1)

    def weights(self, x: Embedded, size: PerToken | None) -> tuple[Float[Array, "B h L L"], Float[Array, "B h L d"]]:
        """Returns each token's attention to each token, float32 `[B, heads, L, L]`, queries first; and the values."""
        q, k, v = rearrange(self.qkv(x), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.config.num_heads)
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * self.config.head_dim**-0.5
        if size is not None:
            logits = logits + jnp.log(size)[:, None, None, :]
        return jax.nn.softmax(logits, axis=-1), v


class Mlp(nnx.Module):
    """Linear -> exact GELU -> Linear."""

    def __init__(self, config: DeitConfig, *, rngs: nnx.Rngs):
        self.fc1 = _linear(config.embed_dim, config.mlp_dim, config, rngs)
        self.fc2 = _linear(config.mlp_dim, config.embed_dim, config, rngs)

    def __call__(self, x: Embedded) -> Embedded:
        """Maps `[B, L, D]` to `[B, L, D]`, each token separately."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class DeitBlock(Block):
    """x + attention(LayerNorm(x)), then the reduction if there is one, then x + MLP(LayerNorm(x))."""

    def __init__(self, config: DeitConfig, index: int, *, rngs: nnx.Rngs):
        self.config = config
        rate = config.drop_path_rate(index)
        self.norm1 = layer_norm(config.embed_dim, 1e-6, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.drop_path1 = DropPath(rate, 2 * index)
        self.norm2 = layer_norm(config.embed_dim, 1e-6, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.drop_path2 = DropPath(rate, 2 * index + 1)

    def mix(self, tokens: Tokens, paths: None, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """Runs the attention; `paths` is None, because attention needs none."""
        mixed, attention = self.attn(self._normed(tokens), tokens.size)
        x = tokens.x + self.drop_path1(mixed, keys).astype(jnp.float32)
        return dataclasses.replace(tokens, x=x), {"attention": attention}

    def attention(self, tokens: Tokens) -> Float[Array, "B L L"]:
        """Returns each token's attention to each token, the mean over the heads, float32 `[B, L, L]`, queries first."""
        return jnp.mean(self.attn.weights(self._normed(tokens), tokens.size)[0], axis=1)

    def _normed(self, tokens: Tokens) -> Embedded:
        return self.norm1(tokens.x).astype(self.config.dtype)

    def transform(self, tokens: Tokens, keys: jax.Array | None) -> Tokens:
        """Runs the MLP."""
        made = self.mlp(self.norm2(tokens.x).astype(self.config.dtype))
        return dataclasses.replace(tokens, x=tokens.x + self.drop_path2(made, keys).astype(jnp.float32))


class Deit(Backbone):
    """A DeiT classifier without a distillation token."""

    EVIDENCE: ClassVar = ("attention",)

    def __init__(self, config: DeitConfig, pruning: Reduction | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, pruning)
        width = config.embed_dim
        self.patch_embed = PatchEmbed(
            width,
            config.patch_size,
            config.patch_size,
            dtype=config.dtype,
            kernel_init=init.uniform_fan_in_conv,
            bias_init=init.uniform((3 * config.patch_size**2) ** -0.5),
            rngs=rngs,
        )
        self.cls_token = nnx.Param(init.trunc_normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(init.trunc_normal(rngs.params(), (1, config.num_patches + 1, width)))
        self.blocks = nnx.List([DeitBlock(config, i, rngs=rngs) for i in range(config.depth)])
        self.norm = layer_norm(width, 1e-6, rngs)
        self.head = nnx.data(make_head(config, rngs))

    def embed(self, images: Images) -> Tokens:
        """Returns the class token and the patches, position embedding added; the stream is float32."""
        x = self.patch_embed(images).astype(jnp.float32)
        batch, _, width = x.shape
        cls = jnp.broadcast_to(self.cls_token[...], (batch, 1, width))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed[...]
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        return Tokens(
            x=x,
            residual=None,
            positions=jnp.broadcast_to(places, x.shape[:2]),
            cls_index=jnp.zeros((batch,), jnp.int32),
            cls_home="first",
            grid=self.config.grid,
        )

    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """Applies the final norm."""
        return self.norm(tokens.x)

    def pool(self, features: Features) -> Float[Array, "B D"]:
        """Returns the class token."""
        assert features.cls is not None  # every DeiT has one
        return features.cls


def _linear(inputs: int, outputs: int, config: DeitConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a projection computed in the model's dtype."""
    return nnx.Linear(inputs, outputs, dtype=config.dtype, kernel_init=init.trunc_normal, rngs=rngs)
