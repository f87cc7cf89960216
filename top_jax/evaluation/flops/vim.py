"""What a ViM costs."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import Parts, Passage, patches_and_head
from top_jax.models import VimConfig

_DIRECTIONS: Final = {"published": 1, "all_directions": 2}


def _block(config: VimConfig, tokens: Passage) -> int:
    inner, states, rank = config.inner_dim, config.d_state, config.dt_rank
    projections = config.embed_dim * 2 * inner + inner * config.embed_dim
    direction = inner * config.d_conv + inner * (rank + 2 * states) + rank * inner + 9 * inner * states
    return tokens.entering * (projections + _DIRECTIONS[tokens.convention] * direction)


VIM: Final = Parts(patches_and_head, _block)
