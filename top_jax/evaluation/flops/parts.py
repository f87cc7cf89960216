"""Cost of the stem, the blocks and the head of each model family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from top_jax.models import BackboneConfig, DeitConfig, DenseVimConfig, PlainMambaConfig, SegmenterConfig, VimConfig
from top_jax.models.heads import POOL_SCALES
from top_jax.models.plain_mamba import STEM_WIDTH
from top_jax.models.traversals import DIRECTIONS, condensed_grid

CONVENTIONS: Final = ("published", "all_directions", "executed")
BACKBONE_PARTS: Final = ("stem", "projections", "conv", "scan", "attention", "mlp", "merging")
PART_NAMES: Final = (*BACKBONE_PARTS, "neck", "decoder", "resizing", "head")

# Operations of a scan for each token, channel and state, as the papers count them: with the exponential and the
# additions. The multiplications among them are tau A, decay h, B x and C h.
SCAN_OPERATIONS: Final = 9
SCAN_MULTIPLICATIONS: Final = 4

VIM_DIRECTIONS: Final = {"published": 1, "all_directions": 2, "executed": 2}

Macs = dict[str, int]
"""Multiply-accumulates of one image by part of the model, a key of `PART_NAMES`."""


class BlockTokens(NamedTuple):
    """Inputs to the cost of one block, besides the model's sizes.

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
    """Functions that count the multiply-accumulates of one image for a model family.

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


def segmenter_heads(config: SegmenterConfig, img_size: tuple[int, int], convention: str) -> Macs:
    """Counts neck and decode head; the auxiliary head only runs in training.

    Args:
        config: the segmenter's.
        img_size: (height, width) of the image. The backbone's own `img_size` is that of its position embedding.
        convention: `executed` counts the products that resize and pool maps, and resize the logits to the image.
    """
    sizes = config.backbone
    grid = dataclasses.replace(sizes, img_size=img_size).grid
    width, channels = sizes.embed_dim, config.channels
    maps, neck = _pyramid(config, grid)
    places = [rows * columns for rows, columns in maps]
    finer = places[:-1]
    laterals = sum(finer) * width * channels
    pools = sum(scale**2 for scale in POOL_SCALES) * width * channels
    bottleneck = places[-1] * 9 * (width + len(POOL_SCALES) * channels) * channels
    merged = sum(finer) * 9 * channels**2 + places[0] * 9 * len(maps) * channels**2
    decoder = laterals + pools + bottleneck + merged + places[0] * channels * config.num_classes
    found = {"neck": neck, "decoder": decoder}
    if convention != "executed":
        return found
    resized = sum(
        resizing_macs(maps[-1], (scale, scale), width) + resizing_macs((scale, scale), maps[-1], channels)
        for scale in POOL_SCALES
    )
    resized += sum(resizing_macs(maps[i], maps[i - 1], channels) for i in range(1, len(maps)))
    resized += sum(resizing_macs(one, maps[0], channels) for one in maps[1:])
    resized += resizing_macs(maps[0], img_size, config.num_classes)
    if grid != sizes.grid:
        resized += resizing_macs(sizes.grid, grid, width)  # the position embedding
    return {**found, "resizing": resized}


def _pyramid(config: SegmenterConfig, grid: tuple[int, int]) -> tuple[list[tuple[int, int]], int]:
    """Returns the sizes of the maps that the decoder reads, and the cost of the neck."""
    if not config.is_vim:
        return [grid] * len(config.stages), 0
    finest, coarse = (2, 1) if config.backbone.patch_size == 8 else (4, 2)  # times as large as the grid
    factors = (finest, finest / 2, finest / 4, finest / 8)
    maps = [(int(grid[0] * factor), int(grid[1] * factor)) for factor in factors]
    upsampled = grid[0] * grid[1] * 4 * config.backbone.embed_dim**2  # one transposed convolution of the grid
    return maps, upsampled * (1 if coarse == 1 else 1 + 4 + 1)


def resizing_macs(old: tuple[int, int], new: tuple[int, int], channels: int) -> int:
    """Counts the two products that change the size of a map: its rows first, then its columns."""
    rows = 0 if new[0] == old[0] else new[0] * old[0] * old[1] * channels
    columns = 0 if new[1] == old[1] else new[0] * new[1] * old[1] * channels
    return rows + columns
