"""Adds up the multiply-accumulates of one image."""

from __future__ import annotations

import dataclasses
from typing import Final

from top_jax.evaluation.flops.deit import DEIT
from top_jax.evaluation.flops.parts import Parts, Passage
from top_jax.evaluation.flops.plain_mamba import PLAIN_MAMBA
from top_jax.evaluation.flops.vim import VIM
from top_jax.models import BackboneConfig, DeitConfig, PlainMambaConfig, VimConfig
from top_jax.pruning import Pruning, Reduction

CONVENTIONS: Final = ("published", "all_directions")
PARTS: Final[dict[type[BackboneConfig], Parts]] = {VimConfig: VIM, PlainMambaConfig: PLAIN_MAMBA, DeitConfig: DEIT}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        tokens_per_block: tokens that enter each block, class token included.
        macs: multiply-accumulates by convention.
    """

    tokens_per_block: tuple[int, ...]
    macs: dict[str, int]

    def gmacs(self, convention: str) -> float:
        """Billions of multiply-accumulates."""
        return self.macs[convention] / 1e9


def count_macs(config: BackboneConfig, pruning: Reduction | None = None) -> Cost:
    """Counts one image's multiply-accumulates; `pruning=None` is the dense model."""
    parts, extra = PARTS[type(config)], 0 if config.CLASS_TOKEN is None else 1
    counts = (pruning or Pruning()).keep_counts(config.num_patches, config.depth)
    tokens = [config.num_patches + extra]
    for block in range(1, config.depth + 1):
        tokens.append(counts[block] + extra if block in counts else tokens[-1])
    macs = {}
    for convention in CONVENTIONS:
        passages = (Passage(i, tokens[i], tokens[i + 1], convention) for i in range(config.depth))
        macs[convention] = parts.stem_and_head(config) + sum(parts.block(config, passage) for passage in passages)
    return Cost(tuple(tokens[:-1]), macs)
