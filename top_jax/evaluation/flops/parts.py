"""What a family of models says about its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from top_jax.models import BackboneConfig

CONVENTIONS: Final = ("published", "all_directions", "executed")
PART_NAMES: Final = ("stem", "projections", "conv", "scan", "attention", "mlp", "merging", "head")

# Operations of a scan for each token, channel and state, as the papers count them: with the exponential and the
# additions. The multiplications among them are tau A, decay h, B x and C h.
SCAN_OPERATIONS: Final = 9
SCAN_MULTIPLICATIONS: Final = 4

Macs = dict[str, int]
"""Multiply-accumulates of one image by part of the model, a key of `PART_NAMES`."""


class Passage(NamedTuple):
    """Tokens through one block.

    Attributes:
        block: its index, from 0.
        entering: tokens, class token included.
        leaving: tokens; fewer where a DeiT block reduces them in its middle.
        alignment: of the reduction: `none` condenses a grid.
        convention: how to count.
    """

    block: int
    entering: int
    leaving: int
    alignment: str
    convention: str


class Parts(NamedTuple):
    """Multiply-accumulates of one image, by part of the model.

    Attributes:
        stem_and_head: of a config.
        block: of a config and a passage.
        streams: arrays `[B, L, D]` that go from block to block: 2 where a residual goes beside x.
    """

    stem_and_head: Callable[[Any], Macs]
    block: Callable[[Any, Passage], Macs]
    streams: int = 1


def patches_and_head(config: BackboneConfig) -> Macs:
    """Stem and head of a model that cuts the image into patches and projects them."""
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    return {"stem": stem, "head": config.embed_dim * config.num_classes}
