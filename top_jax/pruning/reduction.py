"""The interface of token reduction: after which blocks, how many tokens, and `Tokens -> Tokens`."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import numpy as np

from top_jax.errors import InputError
from top_jax.ops import check_alignment
from top_jax.pruning.score import CONTROLS, Evidence
from top_jax.pruning.tokens import Tokens
from top_jax.typing import SlotScores
from top_jax.values import check_fields, counted, refused, several, share, whole


@dataclasses.dataclass(frozen=True)
class Cut:
    """Numbers of patch tokens before and after one reduction, equal for all images; the class token is not counted.

    Attributes:
        block: 1-based number of the block after whose token mixing the reduction happens.
        before: patch tokens that enter the reduction.
        kept: patch tokens that stay (for `Merging`: those that others are merged into, and those left alone).
        after: patch tokens that continue: `kept`, and for `Evit` one more, fused from the others if there are any.
    """

    block: int
    before: int
    kept: int
    after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction(abc.ABC):
    """A token reduction method and its schedule. Without `after_blocks`, the model is dense.

    After each block in `after_blocks` (in DeiT, between its attention and its MLP) the model passes the tokens and the
    block's evidence to `__call__`, and continues with the result. Counts are Python ints, so that every stage has a
    static shape.

    Attributes:
        after_blocks: increasing 1-based block numbers; 5 reduces after the fifth block.
        keep_ratio: share of the patch tokens that each reduction keeps, in (0, 1]: one number, or one per reduction.
        alignment: how a scan treats missing tokens: `none`, `hold` or `decay` (`top_jax.ops.alignment`).

    Raises:
        InputError: a value out of range.
    """

    after_blocks: tuple[int, ...] = ()
    keep_ratio: float | tuple[float, ...] = 1.0
    alignment: str = "hold"

    def __post_init__(self) -> None:
        blocks = _block_numbers(self.after_blocks)
        object.__setattr__(self, "after_blocks", blocks)
        ratio = self.keep_ratio
        needed = "a share in (0, 1], such as 0.8, or one per reduction"
        if isinstance(ratio, tuple | list | np.ndarray):
            ratio = tuple(share("keep_ratio", one, needed) for one in several("keep_ratio", ratio, needed))
        else:
            ratio = share("keep_ratio", ratio, needed)
        object.__setattr__(self, "keep_ratio", ratio)
        if isinstance(ratio, tuple) and len(ratio) != len(blocks):
            places = counted(len(blocks), "reduction")
            raise InputError(
                f"keep_ratio={ratio} for {places} (after_blocks={blocks}); pass one number, or one per reduction."
            )
        check_fields(self)
        check_alignment(self.alignment)

    @property
    def needed_evidence(self) -> str | None:
        """Name of the evidence that blocks must offer; None if the method needs none."""
        return None

    @abc.abstractmethod
    def __call__(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> Tokens:
        """Reduces the tokens of every image.

        Args:
            tokens: `cut.before` patch tokens per image, and the class token of a model that has one.
            evidence: the evidence about them, from the block that just ran.
            cut: the entry of `schedule` for that block.

        Returns:
            `cut.after` patch tokens per image, and the class token.
        """

    def scores(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> SlotScores | None:
        """Returns the scores by which `__call__` ranks the patch tokens, for the same arguments.

        Returns:
            float32 `[B, K]`, in the order of `Tokens.patch_slots`; the largest stay. None for a method without scores.
        """
        return None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Keep ratios, one per reduction."""
        if isinstance(self.keep_ratio, tuple):
            return self.keep_ratio
        return (self.keep_ratio,) * len(self.after_blocks)

    def schedule(self, num_patches: int, depth: int) -> tuple[Cut, ...]:
        """Lists the cut of each reduction, in a model of `depth` blocks that starts with `num_patches` patch tokens.

        Raises:
            InputError: a reduction at or after the last block, or one that leaves no token.

        Examples:
            >>> [cut.after for cut in Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8).schedule(196, depth=24)]
            [157, 126, 101]
        """
        cuts = []
        for block, ratio in zip(self.after_blocks, self.ratios, strict=True):
            if block >= depth:
                raise InputError(
                    f"after_blocks={self.after_blocks} prunes after block {block} of {depth}: no block would run on "
                    f"the tokens that are left; the last block to prune after is {depth - 1}."
                )
            cuts.append(self.cut(block, num_patches, ratio))
            num_patches = cuts[-1].after
        return tuple(cuts)

    def cut(self, block: int, before: int, ratio: float) -> Cut:
        """Returns one entry of the schedule; keeps ceil(round(ratio * before, 6)), so that 0.55 of 100 is 55, not 56.

        Raises:
            InputError: no token would be left.
        """
        kept = math.ceil(round(ratio * before, 6))
        if kept < 1:
            raise InputError(f"keep_ratio={ratio} leaves none of {before} tokens after block {block}; keep more.")
        return Cut(block, before, kept, after=kept)

    def check_evidence(self, offered: tuple[str, ...]) -> None:
        """Raises InputError if the method needs evidence that is not offered."""
        if self.after_blocks and self.needed_evidence is not None and self.needed_evidence not in (*offered, *CONTROLS):
            raise InputError(
                f"score={self.needed_evidence!r} is not available in this model; choose one of "
                f"{', '.join((*offered, *CONTROLS))}."
            )


def _block_numbers(blocks: Any) -> tuple[int, ...]:
    needed = "increasing block numbers from 1, such as (5, 10, 15)"
    try:
        numbers = (blocks,) if isinstance(blocks, int | np.integer) else several("after_blocks", blocks, needed)
        numbers = tuple(whole("block", number) for number in numbers)
    except InputError:
        raise refused("after_blocks", blocks, needed) from None
    if list(numbers) != sorted(set(numbers)):
        raise refused("after_blocks", blocks, needed)
    return numbers
