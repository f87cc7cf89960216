"""What a DeiT costs, reduced in the middle of its blocks or not."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import Parts
from top_jax.models import DeitConfig


def _stem_and_head(config: DeitConfig) -> int:
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    return stem + config.embed_dim * config.num_classes


def _block(config: DeitConfig, index: int, entering: int, leaving: int, convention: str) -> int:
    width = config.embed_dim
    attention = entering * 4 * width * width + 2 * entering * entering * width  # qkv and proj; q k and attention v
    return attention + leaving * 2 * width * config.mlp_dim


DEIT: Final = Parts(class_tokens=1, stem_and_head=_stem_and_head, block=_block)
