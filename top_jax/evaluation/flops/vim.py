"""What a ViM costs."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import Parts
from top_jax.models import VimConfig

_DIRECTIONS: Final = {"published": 1, "all_directions": 2}


def _stem_and_head(config: VimConfig) -> int:
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    return stem + config.embed_dim * config.num_classes


def _block(config: VimConfig, index: int, entering: int, leaving: int, convention: str) -> int:
    inner, states, rank = config.inner_dim, config.d_state, config.dt_rank
    projections = config.embed_dim * 2 * inner + inner * config.embed_dim
    direction = inner * config.d_conv + inner * (rank + 2 * states) + rank * inner + 9 * inner * states
    return entering * (projections + _DIRECTIONS[convention] * direction)


VIM: Final = Parts(class_tokens=1, stem_and_head=_stem_and_head, block=_block)
