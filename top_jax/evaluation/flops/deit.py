"""What a DeiT costs, reduced in the middle of its blocks or not."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import Macs, Parts, Passage, patches_and_head
from top_jax.models import DeitConfig


def _block(config: DeitConfig, tokens: Passage) -> Macs:
    width, entering = config.embed_dim, tokens.entering
    return {
        "projections": entering * 4 * width * width,  # qkv and proj
        "attention": 2 * entering * entering * width,  # q k and attention v
        "mlp": tokens.leaving * 2 * width * config.mlp_dim,
    }


DEIT: Final = Parts(patches_and_head, _block)
