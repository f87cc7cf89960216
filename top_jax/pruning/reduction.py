"""The one interface of token reduction: when, how many, and `Tokens -> Tokens`."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable

from top_jax.errors import InputError
from top_jax.ops import check_alignment
from top_jax.pruning.score import CONTROLS, Evidence
from top_jax.pruning.tokens import Tokens
from top_jax.typing import SlotScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction(abc.ABC):
    """A way to go on with fewer tokens. No `after_blocks` is the dense model.

    A model runs its blocks; after the token mixing of each block named here (before a DeiT block's MLP) it hands the
    tokens and the block's evidence to `__call__`, and goes on with what comes back. Counts are Python ints, so that
    every stage has a static shape.

    Attributes:
        after_blocks: 1-based, increasing: 5 reduces after the fifth block.
        keep_ratio: share of the patch tokens that stays each time, in (0, 1]: one number, or one per reduction.
        alignment: what a missing token did to the state of a scan: `none`, `hold` or `decay` (`top_jax.pruning`).

    Raises:
        InputError: a value outside these ranges.
    """

    after_blocks: tuple[int, ...] = ()
    keep_ratio: float | tuple[float, ...] = 1.0
    alignment: str = "hold"

    def __post_init__(self) -> None:
        blocks = self.after_blocks
        if not isinstance(blocks, int | Iterable) or isinstance(blocks, str):
            raise InputError(f"after_blocks={blocks!r}; needed: block numbers from 1, such as (5, 10, 15).")
        object.__setattr__(self, "after_blocks", (blocks,) if isinstance(blocks, int) else tuple(blocks))
        if isinstance(self.keep_ratio, list):
            object.__setattr__(self, "keep_ratio", tuple(self.keep_ratio))
        blocks = self.after_blocks
        if any(not isinstance(b, int) or isinstance(b, bool) or b < 1 for b in blocks) or list(blocks) != sorted(
            set(blocks)
        ):
            raise InputError(f"after_blocks={blocks}; needed: increasing block numbers from 1, such as (5, 10, 15).")
        if isinstance(self.keep_ratio, tuple) and len(self.keep_ratio) != len(blocks):
            raise InputError(
                f"keep_ratio has {len(self.keep_ratio)} numbers for {len(blocks)} prunes (after_blocks={blocks}); "
                "pass one number, or one per prune."
            )
        for ratio in self.ratios:
            if isinstance(ratio, (bool, str)) or ratio is None or not 0 < ratio <= 1:
                raise InputError(f"keep_ratio={ratio!r}; needed: a share in (0, 1], such as 0.8.")
        check_alignment(self.alignment)

    @property
    def evidence(self) -> str | None:
        """Name of the evidence that blocks must give, if any."""
        return None

    @abc.abstractmethod
    def __call__(self, tokens: Tokens, evidence: Evidence, *, block: int, keep: int) -> Tokens:
        """Reduces.

        Args:
            tokens: of every image.
            evidence: of the block just run.
            block: its 1-based number.
            keep: patch tokens to go on with, from `keep_counts`.

        Returns:
            `keep` patch tokens, and the class token of a model that has one.
        """

    def scores(self, tokens: Tokens, evidence: Evidence, *, block: int, keep: int) -> SlotScores | None:
        """What `__call__` ranks the patch tokens by, for the same arguments.

        Returns:
            float32 `[B, K]`, in the order of `Tokens.patch_slots`; the largest stay. None for a method that ranks none.
        """
        return None

    @property
    def ratios(self) -> tuple[float, ...]:
        """One keep ratio per reduction."""
        if isinstance(self.keep_ratio, tuple):
            return self.keep_ratio
        return (self.keep_ratio,) * len(self.after_blocks)

    def keep_counts(self, num_patches: int, depth: int) -> dict[int, int]:
        """Patch tokens left after each reduction: {block: K'}, K' = `kept(K, ratio)`.

        >>> Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8).keep_counts(196, depth=24)
        {5: 157, 10: 126, 15: 101}

        Raises:
            InputError: a reduction at or after the last block, or one that leaves no token.
        """
        counts = {}
        for block, ratio in zip(self.after_blocks, self.ratios, strict=True):
            if block >= depth:
                raise InputError(
                    f"after_blocks={self.after_blocks} prunes after block {block} of {depth}: nothing would run on "
                    f"what is left; the last place to prune is after block {depth - 1}."
                )
            kept = self.kept(num_patches, ratio)
            if kept < 1:
                raise InputError(
                    f"keep_ratio={ratio} leaves none of {num_patches} tokens after block {block}; keep more."
                )
            counts[block] = num_patches = kept
        return counts

    def kept(self, num_patches: int, ratio: float) -> int:
        """Patch tokens left of `num_patches`: ceil(round(ratio * K, 6)), where 0.55 of 100 is 55 and not 56."""
        return math.ceil(round(ratio * num_patches, 6))

    def check_evidence(self, offered: tuple[str, ...]) -> None:
        """Raises InputError unless blocks that offer this evidence will do."""
        if self.after_blocks and self.evidence is not None and self.evidence not in (*offered, *CONTROLS):
            raise InputError(
                f"score={self.evidence!r}: this model's blocks give only {', '.join((*offered, *CONTROLS))}; "
                "choose one of these."
            )
