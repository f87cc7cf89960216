"""What reducing tokens costs: the products of EViT and of merging. Scores, sorts and gathers are none."""

from __future__ import annotations

from typing import NamedTuple

from top_jax.pruning import Evit, Merging, Reduction


class Reduced(NamedTuple):
    """One reduction.

    Attributes:
        patches: patch tokens before it.
        keep: patch tokens after it.
        ratio: its keep ratio.
        class_tokens: 1, or 0 for a model without one.
        width: D.
        streams: arrays of that width that are reduced: 2 where there is a residual beside x.
    """

    patches: int
    keep: int
    ratio: float
    class_tokens: int
    width: int
    streams: int


def reduction_macs(reduction: Reduction, at: Reduced) -> int:
    """Multiply-accumulates of one image's reduction; one that is not known here counts as free.

    `cross_check.py` shows whether it is.
    """
    if isinstance(reduction, Merging):
        return _merging(at)
    return _evit(reduction, at) if isinstance(reduction, Evit) else 0


def _merging(at: Reduced) -> int:
    """Every source by every target; then a one-hot matrix by what is merged, into all that are left."""
    gone = at.patches - at.keep
    if gone == 0:
        return 0
    alike = -(-at.patches // 2) * (at.patches // 2) * at.width
    return alike + gone * (at.keep + at.class_tokens) * at.width * at.streams


def _evit(reduction: Evit, at: Reduced) -> int:
    """The fused token is a weighted sum of the others."""
    best = Reduction.kept(reduction, at.patches, at.ratio)
    return (at.patches - best) * at.width * at.streams if reduction.fuse else 0
