"""What a ViM costs."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import SCAN_OPERATIONS, Macs, Parts, Passage, patches_and_head
from top_jax.models import VimConfig

_DIRECTIONS: Final = {"published": 1, "all_directions": 2, "executed": 2}


def _block(config: VimConfig, tokens: Passage) -> Macs:
    width, inner, states, rank = config.embed_dim, config.inner_dim, config.d_state, config.dt_rank
    directions = _DIRECTIONS[tokens.convention]
    of_direction = inner * (rank + 2 * states) + rank * inner
    return {
        "projections": tokens.entering * (width * 2 * inner + inner * width + directions * of_direction),
        "conv": tokens.entering * directions * config.d_conv * inner,
        "scan": tokens.entering * directions * SCAN_OPERATIONS * inner * states,
    }


VIM: Final = Parts(patches_and_head, _block, streams=2)
