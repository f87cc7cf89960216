"""Vision Mamba (ViM), arXiv 2401.09417, with token pruning between blocks.

    images -> patches + class token + position -> [block] * depth, pruned after some -> norm -> class token -> head

Source: hustvl/Vim, vim/models_mamba.py, `VisionMamba` (rms_norm, residual_in_fp32, bimamba_type="v2",
if_divide_out, use_middle_cls_token).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.errors import InputError
from top_jax.models.features import Features, split_class_token
from top_jax.models.layers import DropPath, PatchEmbed
from top_jax.models.mamba_mixer import MambaMixer
from top_jax.models.vim_config import VimConfig
from top_jax.pruning import Evidence, Pruning, Tokens, prune
from top_jax.typing import Embedded, Images, Logits


class VimBlock(nnx.Module):
    """Add -> RMSNorm -> Mixer, on the pair (hidden, residual)."""

    def __init__(self, config: VimConfig, index: int, *, rngs: nnx.Rngs):
        self.drop_path = DropPath(config.drop_path_rate(index), index)
        self.norm = nnx.RMSNorm(config.embed_dim, epsilon=1e-5, rngs=rngs)
        self.mixer = MambaMixer(config, rngs=rngs)

    def __call__(self, tokens: Tokens, alignment: str, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """One block; the evidence is what token scores may need."""
        residual = tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32)
        # With `none` a pruned token never existed, so the scan is not told where the others were.
        positions = None if alignment == "none" else tokens.positions
        x, evidence = self.mixer(self.norm(residual).astype(tokens.x.dtype), positions, alignment)
        return dataclasses.replace(tokens, x=x, residual=residual), evidence


class Vim(nnx.Module):
    """A ViM classifier; the dense model is the one with the empty pruning schedule."""

    def __init__(self, config: VimConfig, pruning: Pruning | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.pruning = pruning or Pruning()
        self.keep_counts = self.pruning.keep_counts(config.num_patches, config.depth)
        embedding = nnx.initializers.normal(0.02)
        width = config.embed_dim
        self.patch_embed = PatchEmbed(width, config.patch_size, config.stride, dtype=config.dtype, rngs=rngs)
        self.cls_token = nnx.Param(embedding(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(embedding(rngs.params(), (1, config.num_patches + 1, width)))
        self.blocks = nnx.List([VimBlock(config, i, rngs=rngs) for i in range(config.depth)])
        self.drop_path = DropPath(config.drop_path, config.depth)
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(
            width,
            config.num_classes,
            dtype=config.dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def __call__(self, images: Images, keys: jax.Array | None = None) -> Logits:
        """Classifies images.

        Args:
            images: float32 `[B, H, W, 3]`, normalised.
            keys: `[B]` PRNG keys, one per image: needed in train mode with drop_path > 0.

        Returns:
            float32 logits `[B, num_classes]`.

        Raises:
            InputError: images of another size than the model's.
        """
        return self.classify(self.features(images, keys))

    def classify(self, features: Features) -> Logits:
        """Logits of `features`."""
        assert features.cls is not None  # every ViM has a class token
        return self.head(features.cls.astype(self.config.dtype)).astype(jnp.float32)

    def features(self, images: Images, keys: jax.Array | None = None) -> Features:
        """Final tokens of images, after the final norm: see `Features`. Arguments as of `__call__`."""
        tokens = self.embed(images)
        for number, block in enumerate(self.blocks, start=1):
            run = jax.checkpoint(VimBlock.__call__, static_argnums=(2,)) if self.config.remat else VimBlock.__call__
            tokens, evidence = run(block, tokens, self.pruning.alignment, keys)
            if number in self.keep_counts:
                tokens = prune(tokens, evidence, self.pruning, block=number, keep=self.keep_counts[number])
        return split_class_token(self._normalised(tokens, keys), slot=self.config.num_patches // 2)

    def embed(self, images: Images) -> Tokens:
        """Patches and class token with their position embedding: the tokens that enter the first block."""
        if images.shape[1:] != (*self.config.img_size, 3):
            raise InputError(
                f"images have shape {images.shape}; this model needs [B, {self.config.img_size[0]}, "
                f"{self.config.img_size[1]}, 3]: a batch axis first, channels last, and the img_size of the model."
            )
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

    def _normalised(self, tokens: Tokens, keys: jax.Array | None) -> Tokens:
        residual: Embedded = tokens.residual + self.drop_path(tokens.x, keys).astype(jnp.float32)
        return dataclasses.replace(tokens, x=self.norm(residual), residual=residual)
