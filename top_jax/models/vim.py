"""Vision Mamba (ViM), arXiv 2401.09417, with token reduction between blocks.

    images -> patches + class token + position -> [block] * depth, reduced after some -> norm -> class token -> head

Source: hustvl/Vim, vim/models_mamba.py, `VisionMamba` (rms_norm, residual_in_fp32, bimamba_type="v2",
if_divide_out, use_middle_cls_token).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.models import initializers as init
from top_jax.models.backbone import Backbone, Block
from top_jax.models.features import Features
from top_jax.models.layers import DropPath, PatchEmbed
from top_jax.models.mamba_mixer import MambaMixer
from top_jax.models.scan_inputs import ScanInputs
from top_jax.models.vim_config import VimConfig
from top_jax.pruning import SCAN_EVIDENCE, Evidence, Reduction, Tokens
from top_jax.typing import Array, Embedded, Float, Images, Positions


class VimBlock(Block):
    """Add -> RMSNorm -> Mixer, on the pair (hidden, residual)."""

    def __init__(self, config: VimConfig, index: int, *, rngs: nnx.Rngs):
        self.drop_path = DropPath(config.drop_path_rate(index), index)
        self.norm = nnx.RMSNorm(config.embed_dim, epsilon=1e-5, rngs=rngs)
        self.mixer = MambaMixer(config, rngs=rngs)

    def mix(self, tokens: Tokens, paths: Positions | None, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """The whole block; `paths` are the tokens' positions where gaps are to be felt."""
        residual, x = self._add_and_norm(tokens, keys)
        x, evidence = self.mixer(x, paths)
        return dataclasses.replace(tokens, x=x, residual=residual), evidence

    def scan_inputs(self, tokens: Tokens, paths: Positions | None) -> ScanInputs:
        """Of the two scans."""
        return self.mixer.scan_inputs(self._add_and_norm(tokens, None)[1], paths)

    def _add_and_norm(self, tokens: Tokens, keys: jax.Array | None) -> tuple[Embedded, Embedded]:
        assert tokens.residual is not None
        residual = tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32)
        return residual, self.norm(residual).astype(tokens.x.dtype)


class Vim(Backbone):
    """A ViM classifier."""

    EVIDENCE: ClassVar = SCAN_EVIDENCE

    def __init__(self, config: VimConfig, pruning: Reduction | None = None, *, rngs: nnx.Rngs):
        super().__init__(config, pruning)
        width = config.embed_dim
        self.patch_embed = PatchEmbed(width, config.patch_size, config.stride, dtype=config.dtype, rngs=rngs)
        self.cls_token = nnx.Param(init.trunc_normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(init.trunc_normal(rngs.params(), (1, config.num_patches + 1, width)))
        self.blocks = nnx.List([VimBlock(config, i, rngs=rngs) for i in range(config.depth)])
        self.drop_path = DropPath(config.drop_path, config.depth)
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(
            width,
            config.num_classes,
            dtype=config.dtype,
            kernel_init=init.trunc_normal,
            rngs=rngs,
        )

    def embed(self, images: Images) -> Tokens:
        """Patches with the class token in their middle, and their position embedding."""
        x = self.patch_embed(images)
        batch, num_patches, width = x.shape
        middle = num_patches // 2
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (batch, 1, width))
        x = jnp.concatenate([x[:, :middle], cls, x[:, middle:]], axis=1) + self.pos_embed[...].astype(x.dtype)
        return Tokens(
            x=x,
            residual=jnp.zeros(x.shape, jnp.float32),
            positions=jnp.broadcast_to(jnp.arange(num_patches + 1, dtype=jnp.int32)[None, :], x.shape[:2]),
            cls_index=jnp.full((batch,), middle, jnp.int32),
        )

    def paths(self, tokens: Tokens) -> Positions | None:
        """Positions under `decay`. `hold` needs none: what it asks for, the original order, the tokens have."""
        return tokens.positions if self.pruning.alignment == "decay" else None

    def stream(self, tokens: Tokens) -> Embedded:
        """Residual and hidden state, added as the next block would."""
        assert tokens.residual is not None
        return tokens.residual + tokens.x.astype(jnp.float32)

    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """The final Add, under the last drop-path, and its norm."""
        assert tokens.residual is not None
        return self.norm(tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32))

    def pool(self, features: Features) -> Float[Array, "B D"]:
        """The class token."""
        assert features.cls is not None  # every ViM has one
        return features.cls
