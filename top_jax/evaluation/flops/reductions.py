"""Multiply-accumulates of reducing tokens: the products of EViT and of merging. Scores, sorts and gathers have none."""

from __future__ import annotations

from top_jax.pruning import Cut, Evit, Merging, Reduction


def reduction_macs(reduction: Reduction, cut: Cut, width: int, streams: int, class_tokens: int) -> int:
    """Counts one image's reduction; a method that is not known here counts as free (the check of `executed` finds out).

    Args:
        reduction: the method.
        cut: its entry for one block.
        width: D.
        streams: arrays `[B, L, D]` that are reduced: 2 with a separate residual stream, else 1.
        class_tokens: 1, or 0 for a model without one.
    """
    gone = cut.before - cut.kept
    if isinstance(reduction, Evit) and reduction.fuse:
        return gone * width * streams  # the fused token is a weighted sum of the others
    if isinstance(reduction, Merging) and gone:
        similarity = -(-cut.before // 2) * (cut.before // 2) * width  # every source with every target
        return similarity + gone * (cut.after + class_tokens) * width * streams  # a one-hot product adds the merged
    return 0
