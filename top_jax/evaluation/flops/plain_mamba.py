"""What a PlainMamba costs."""

from __future__ import annotations

from typing import Final

from top_jax.evaluation.flops.parts import Parts, Passage
from top_jax.models import PlainMambaConfig
from top_jax.models.plain_mamba import STEM_WIDTH
from top_jax.models.traversals import DIRECTIONS


def _stem_and_head(config: PlainMambaConfig) -> int:
    height, width = config.img_size
    pixels = -(-height // 2) * -(-width // 2)  # the first convolution halves the image
    convolutions = pixels * STEM_WIDTH * (7 * 7 * 3 + config.num_convs_patch_embed * 3 * 3 * STEM_WIDTH)
    patches = config.num_patches * (config.patch_size // 2) ** 2 * STEM_WIDTH * config.embed_dim
    return convolutions + patches + config.embed_dim * config.num_classes


def _block(config: PlainMambaConfig, tokens: Passage) -> int:
    width, inner, states, rank = config.embed_dim, config.inner_dim, config.d_state, config.dt_rank
    projections = width * 2 * inner + inner * width + inner * (rank + 2 * states) + rank * inner
    scans = DIRECTIONS * 9 * inner * states
    tail = 3 * 3 * width if tokens.block in config.layers_with_dwconv else 0
    return tokens.entering * (projections + config.d_conv**2 * inner + scans + tail)


PLAIN_MAMBA: Final = Parts(_stem_and_head, _block)
