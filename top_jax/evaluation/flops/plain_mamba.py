"""What a PlainMamba costs."""

from __future__ import annotations

import math
from typing import Final

from top_jax.evaluation.flops.parts import SCAN_OPERATIONS, Macs, Parts, Passage
from top_jax.models import PlainMambaConfig
from top_jax.models.plain_mamba import STEM_WIDTH
from top_jax.models.traversals import DIRECTIONS, condensed_grid


def _stem_and_head(config: PlainMambaConfig) -> Macs:
    height, width = config.img_size
    pixels = -(-height // 2) * -(-width // 2)  # the first convolution halves the image
    convolutions = pixels * STEM_WIDTH * (7 * 7 * 3 + config.num_convs_patch_embed * 3 * 3 * STEM_WIDTH)
    patches = config.num_patches * (config.patch_size // 2) ** 2 * STEM_WIDTH * config.embed_dim
    return {"stem": convolutions + patches, "head": config.embed_dim * config.num_classes}


def _block(config: PlainMambaConfig, tokens: Passage) -> Macs:
    width, inner, states, rank = config.embed_dim, config.inner_dim, config.d_state, config.dt_rank
    projections = width * 2 * inner + inner * width + inner * (rank + 2 * states) + rank * inner
    taps = config.d_conv**2 * inner + (3 * 3 * width if tokens.block in config.layers_with_dwconv else 0)
    places = tokens.entering
    if tokens.convention == "executed":
        projections += DIRECTIONS * (DIRECTIONS + 1) * states  # direction_Bs: each traversal's one-hot moves by it
        places = _cells(config, tokens)
    return {
        "projections": tokens.entering * projections,
        "conv": places * taps,
        "scan": tokens.entering * DIRECTIONS * SCAN_OPERATIONS * inner * states,
    }


def _cells(config: PlainMambaConfig, tokens: Passage) -> int:
    """Of the grid that is convolved, tokens on them or not."""
    condensed = tokens.alignment == "none" and tokens.entering < config.num_patches
    return math.prod(condensed_grid(tokens.entering)) if condensed else config.num_patches


PLAIN_MAMBA: Final = Parts(_stem_and_head, _block)
