"""What the stem, the blocks and the head of each model family cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from top_jax.models import BackboneConfig, DeitConfig, DenseVimConfig, PlainMambaConfig, VimConfig
from top_jax.models.plain_mamba import STEM_WIDTH
from top_jax.models.traversals import DIRECTIONS, condensed_grid

CONVENTIONS: Final = ("published", "all_directions", "executed")
PART_NAMES: Final = ("stem", "projections", "conv", "scan", "attention", "mlp", "merging", "head")

# Operations of a scan for each token, channel and state, as the papers count them: with the exponential and the
# additions. The multiplications among them are tau A, decay h, B x and C h.
SCAN_OPERATIONS: Final = 9
SCAN_MULTIPLICATIONS: Final = 4

VIM_DIRECTIONS: Final = {"published": 1, "all_directions": 2, "executed": 2}

Macs = dict[str, int]
"""Multiply-accumulates of one image by part of the model, a key of `PART_NAMES`."""


class BlockTokens(NamedTuple):
    """What the cost of one block depends on, besides the model's sizes.

    Attributes:
        block: its index, from 0.
        entering: tokens that enter it, class token included.
        leaving: tokens that leave it; a DeiT block reduces them between attention and MLP.
        alignment: alignment of the reduction; `none` condenses PlainMamba's grid.
        convention: one of `CONVENTIONS`.
    """

    block: int
    entering: int
    leaving: int
    alignment: str
    convention: str


class FamilyCost(NamedTuple):
    """How to count the multiply-accumulates of one image for a model family.

    Attributes:
        stem_and_head: takes the model's config; the same in every convention.
        block: takes the model's config and the tokens of one block.
        streams: arrays `[B, L, D]` that go from block to block: 2 with a separate residual stream (ViM), else 1.
    """

    stem_and_head: Callable[[Any], Macs]
    block: Callable[[Any, BlockTokens], Macs]
    streams: int = 1


def _patches_and_head(config: BackboneConfig) -> Macs:
    """Counts a stem that projects P x P patches, as ViM and DeiT have it, and the head."""
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    return {"stem": stem, "head": config.embed_dim * config.num_classes}


def _vim_block(config: VimConfig, tokens: BlockTokens) -> Macs:
    width, inner, states, rank = config.embed_dim, config.inner_dim, config.d_state, config.dt_rank
    directions = VIM_DIRECTIONS[tokens.convention]
    per_direction = inner * (rank + 2 * states) + rank * inner  # x_proj and dt_proj
    return {
        "projections": tokens.entering * (width * 2 * inner + inner * width + directions * per_direction),
        "conv": tokens.entering * directions * config.d_conv * inner,
        "scan": tokens.entering * directions * SCAN_OPERATIONS * inner * states,
    }


def _plain_mamba_stem_and_head(config: PlainMambaConfig) -> Macs:
    height, width = config.img_size
    pixels = -(-height // 2) * -(-width // 2)  # the first convolution halves the image
    convolutions = pixels * STEM_WIDTH * (7 * 7 * 3 + config.num_convs_patch_embed * 3 * 3 * STEM_WIDTH)
    patches = config.num_patches * (config.patch_size // 2) ** 2 * STEM_WIDTH * config.embed_dim
    return {"stem": convolutions + patches, "head": config.embed_dim * config.num_classes}


def _plain_mamba_block(config: PlainMambaConfig, tokens: BlockTokens) -> Macs:
    width, inner, states, rank = config.embed_dim, config.inner_dim, config.d_state, config.dt_rank
    projections = width * 2 * inner + inner * width + inner * (rank + 2 * states) + rank * inner
    taps = config.d_conv**2 * inner + (3 * 3 * width if tokens.block in config.layers_with_dwconv else 0)
    convolved = tokens.entering
    if tokens.convention == "executed":
        projections += DIRECTIONS * (DIRECTIONS + 1) * states  # one-hot moves times direction_Bs, per traversal
        condensed = tokens.alignment == "none" and tokens.entering < config.num_patches
        convolved = math.prod(condensed_grid(tokens.entering)) if condensed else config.num_patches
    return {
        "projections": tokens.entering * projections,
        "conv": convolved * taps,
        "scan": tokens.entering * DIRECTIONS * SCAN_OPERATIONS * inner * states,
    }


def _deit_block(config: DeitConfig, tokens: BlockTokens) -> Macs:
    width, entering = config.embed_dim, tokens.entering
    return {
        "projections": entering * 4 * width * width,  # qkv and proj
        "attention": 2 * entering * entering * width,  # q k, and attention v
        "mlp": tokens.leaving * 2 * width * config.mlp_dim,
    }


FAMILIES: Final[dict[type[BackboneConfig], FamilyCost]] = {
    VimConfig: FamilyCost(_patches_and_head, _vim_block, streams=2),
    DenseVimConfig: FamilyCost(_patches_and_head, _vim_block, streams=2),
    PlainMambaConfig: FamilyCost(_plain_mamba_stem_and_head, _plain_mamba_block),
    DeitConfig: FamilyCost(_patches_and_head, _deit_block),
}
