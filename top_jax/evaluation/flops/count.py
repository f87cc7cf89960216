"""Adds up the multiply-accumulates of one image."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

from top_jax.evaluation.flops.deit import DEIT
from top_jax.evaluation.flops.parts import CONVENTIONS, PART_NAMES, Macs, Parts, Passage
from top_jax.evaluation.flops.plain_mamba import PLAIN_MAMBA
from top_jax.evaluation.flops.reductions import reduction_macs
from top_jax.evaluation.flops.vim import VIM
from top_jax.models import BackboneConfig, DeitConfig, PlainMambaConfig, VimConfig
from top_jax.pruning import Pruning, Reduction

PARTS: Final[dict[type[BackboneConfig], Parts]] = {VimConfig: VIM, PlainMambaConfig: PLAIN_MAMBA, DeitConfig: DEIT}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        tokens_per_block: tokens that enter each block, class token included.
        stem_and_head: their multiply-accumulates by part, the same in every convention.
        blocks: by convention, each block's by part; what reduces tokens after a block is its part `merging`.
    """

    tokens_per_block: tuple[int, ...]
    stem_and_head: Macs
    blocks: dict[str, tuple[Macs, ...]]

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by convention."""
        return {convention: sum(self.parts(convention).values()) for convention in self.blocks}

    def parts(self, convention: str) -> Macs:
        """Multiply-accumulates by part, over all blocks; the parts that there are, in the order of `PART_NAMES`."""
        total: Counter[str] = Counter()
        for macs in (self.stem_and_head, *self.blocks[convention]):
            total.update(macs)
        return {part: total[part] for part in PART_NAMES if total[part]}

    def gmacs(self, convention: str) -> float:
        """Billions of multiply-accumulates."""
        return self.macs[convention] / 1e9


def count_macs(config: BackboneConfig, pruning: Reduction | None = None) -> Cost:
    """Counts one image's multiply-accumulates; `pruning=None` is the dense model."""
    reduction, class_tokens = pruning or Pruning(), 0 if config.CLASS_TOKEN is None else 1
    cuts = {cut.block: cut for cut in reduction.schedule(config.num_patches, config.depth)}
    tokens = [config.num_patches + class_tokens]
    for block in range(1, config.depth + 1):
        tokens.append(cuts[block].after + class_tokens if block in cuts else tokens[-1])
    parts = PARTS[type(config)]

    def block_macs(i: int, convention: str) -> Macs:
        macs = parts.block(config, Passage(i, tokens[i], tokens[i + 1], reduction.alignment, convention))
        if convention == "executed" and i + 1 in cuts:
            macs["merging"] = reduction_macs(reduction, cuts[i + 1], config.embed_dim, parts.streams, class_tokens)
        return macs

    blocks = {convention: tuple(block_macs(i, convention) for i in range(config.depth)) for convention in CONVENTIONS}
    return Cost(tuple(tokens[:-1]), parts.stem_and_head(config), blocks)
