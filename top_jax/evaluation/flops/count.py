"""Adds up the multiply-accumulates of one image."""

from __future__ import annotations

import dataclasses
from collections import Counter

from top_jax.evaluation.flops.parts import (
    BACKBONE_PARTS,
    CONVENTIONS,
    FAMILIES,
    PART_NAMES,
    BlockTokens,
    Macs,
    segmenter_heads,
)
from top_jax.models import BackboneConfig, SegmenterConfig
from top_jax.pruning import Cut, Evit, Merging, Pruning, Reduction


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one image.

    Attributes:
        tokens_per_block: tokens that enter each block, class token included.
        stem_and_head: multiply-accumulates of stem and head, the same in every convention.
        blocks: for each convention, the multiply-accumulates of every block by part. Reducing tokens after a block is
            that block's part `merging`.
        heads: for each convention, those of a segmenter's neck and decode head by part; None for a classifier.
    """

    tokens_per_block: tuple[int, ...]
    stem_and_head: Macs
    blocks: dict[str, tuple[Macs, ...]]
    heads: dict[str, Macs] | None = None

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by convention."""
        return {convention: sum(self.parts(convention).values()) for convention in self.blocks}

    @property
    def backbone_macs(self) -> dict[str, int]:
        """Multiply-accumulates of the backbone alone, by convention; neck and heads are excluded."""
        return {
            convention: sum(macs for part, macs in self.parts(convention).items() if part in BACKBONE_PARTS)
            for convention in self.blocks
        }

    def parts(self, convention: str) -> Macs:
        """Returns multiply-accumulates by part, summed over the blocks, in the order of `PART_NAMES`, without zeros."""
        total: Counter[str] = Counter()
        heads = {} if self.heads is None else self.heads[convention]
        for macs in (self.stem_and_head, *self.blocks[convention], heads):
            total.update(macs)
        return {part: total[part] for part in PART_NAMES if total[part]}

    def in_gmacs(self) -> dict[str, dict[str, float]]:
        """Returns billions of multiply-accumulates by convention: `gmacs`, and `backbone_gmacs` of a segmenter."""
        counts = {"gmacs": self.macs} | ({} if self.heads is None else {"backbone_gmacs": self.backbone_macs})
        return {name: {convention: n / 1e9 for convention, n in of.items()} for name, of in counts.items()}

    def gmacs(self, convention: str) -> float:
        """Returns billions of multiply-accumulates."""
        return self.macs[convention] / 1e9


def count_macs(
    config: BackboneConfig | SegmenterConfig,
    pruning: Reduction | None = None,
    *,
    img_size: tuple[int, int] | None = None,
) -> Cost:
    """Counts one image's multiply-accumulates; `pruning=None` is the dense model.

    Args:
        config: the model's.
        pruning: how its tokens are reduced.
        img_size: (height, width) of the image; None is that of the config. Only a PlainMamba segmenter takes others.

    Raises:
        InputError: a reduction that a model of this depth and size cannot have.
    """
    if isinstance(config, SegmenterConfig):
        size = config.backbone.img_size if img_size is None else img_size
        heads = {convention: segmenter_heads(config, size, convention) for convention in CONVENTIONS}
        cost = count_macs(dataclasses.replace(config.backbone, img_size=size), pruning)
        last, rest = config.stages[-1], config.backbone.depth - config.stages[-1]
        run = (*cost.blocks["executed"][:last], *({} for _ in range(rest)))  # XLA drops blocks that no map needs
        return dataclasses.replace(cost, heads=heads, blocks={**cost.blocks, "executed": run})
    reduction, family = pruning or Pruning(), FAMILIES[type(config)]
    class_tokens = 0 if config.CLASS_TOKEN is None else 1
    cuts = {cut.block: cut for cut in reduction.schedule(config.num_patches, config.depth)}
    tokens = [config.num_patches + class_tokens]
    for block in range(1, config.depth + 1):
        tokens.append(cuts[block].after + class_tokens if block in cuts else tokens[-1])

    def block_macs(i: int, convention: str) -> Macs:
        macs = family.block(config, BlockTokens(i, tokens[i], tokens[i + 1], reduction.alignment, convention))
        if convention == "executed" and i + 1 in cuts:
            macs["merging"] = reduction_macs(reduction, cuts[i + 1], config.embed_dim, family.streams, class_tokens)
        return macs

    blocks = {convention: tuple(block_macs(i, convention) for i in range(config.depth)) for convention in CONVENTIONS}
    return Cost(tuple(tokens[:-1]), family.stem_and_head(config), blocks)


def reduction_macs(reduction: Reduction, cut: Cut, width: int, streams: int, class_tokens: int) -> int:
    """Counts the products of one reduction for one image; scores, sorts and gathers have none.

    A method that is not listed here counts as 0; if it does multiply, `check_config` reports the difference.

    Args:
        reduction: the method.
        cut: the entry of its schedule.
        width: D.
        streams: as in `FamilyCost`; each stream is reduced.
        class_tokens: 1, or 0 for a model without one.
    """
    gone = cut.before - cut.kept
    if isinstance(reduction, Evit) and reduction.fuse:
        return gone * width * streams  # the fused token is a weighted sum of the others
    if isinstance(reduction, Merging) and gone:
        similarity = -(-cut.before // 2) * (cut.before // 2) * width  # every source with every target
        return similarity + gone * (cut.after + class_tokens) * width * streams  # a one-hot product adds the merged
    return 0
