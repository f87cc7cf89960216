"""What a family of models says about its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from top_jax.models import BackboneConfig


class Passage(NamedTuple):
    """Tokens through one block.

    Attributes:
        block: its index, from 0.
        entering: tokens, class token included.
        leaving: tokens; fewer where a DeiT block reduces them in its middle.
        convention: how to count.
    """

    block: int
    entering: int
    leaving: int
    convention: str


class Parts(NamedTuple):
    """Multiply-accumulates of one image, by part of the model.

    Attributes:
        stem_and_head: of a config.
        block: of a config and a passage.
    """

    stem_and_head: Callable[[Any], int]
    block: Callable[[Any, Passage], int]


def patches_and_head(config: BackboneConfig) -> int:
    """Stem and head of a model that cuts the image into patches and projects them."""
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    return stem + config.embed_dim * config.num_classes
