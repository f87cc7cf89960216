"""ToP: keeps the tokens with the largest scan outputs, by a per-image top-k, in the scan's own order."""

from __future__ import annotations

import dataclasses
from typing import Final

import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.pruning.reduction import Cut, Reduction
from top_jax.pruning.score import Evidence, best_patches, check_ranking, token_scores
from top_jax.pruning.tokens import Tokens
from top_jax.typing import Slots, SlotScores

WAYS: Final = (("none", "score"), ("none", "position"), ("hold", "position"), ("decay", "position"))
"""(alignment, order) pairs that ablations compare: the paper's baseline, then each alignment in scan order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning(Reduction):
    """Token pruning as in ToP, its ablations, and the naive baseline that the paper compares with.

    Attributes:
        after_blocks, keep_ratio, alignment: as in `Reduction`.
        score: the token score: `clip` (the paper's), `noclip`, `l1`, `l2`; `delta` (only the score of MTR, see
            `scan_evidence`); `attention` (DeiT only); or one of the controls `random` and `uniform`.
        order: `position` keeps the survivors in scan order; `score` sorts them best first, as EViT does, and is only
            allowed for the baseline `alignment="none"`.
        seed: seed of the control `random`.

    Raises:
        InputError: a value out of range.

    Source: ToP, arXiv 2409.18962, section 4.
    """

    score: str = "clip"
    order: str = "position"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranking(self.score, self.order, self.seed)
        if self.order == "score" and self.alignment != "none":
            raise InputError(
                f"order='score' with alignment={self.alignment!r}: an aligned scan needs its tokens in scan order; "
                "use order='position', or alignment='none' for the unaligned baseline."
            )

    @property
    def needed_evidence(self) -> str:
        """Name of the score."""
        return self.score

    def scores(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> SlotScores:
        """Returns `score` of the patch tokens."""
        slots, seed = tokens.patch_slots(), self.seed
        return token_scores(self.score, evidence, tokens.positions, slots, keep=cut.kept, seed=seed, block=cut.block)

    def __call__(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> Tokens:
        """Keeps the best patch tokens of each image; `none` re-indexes them as in a smaller image."""
        if cut.kept == cut.before:
            return tokens  # in their own order even with order="score", because nothing was pruned
        best = best_patches(self.scores(tokens, evidence, cut), tokens.patch_slots())[:, : cut.kept]
        return tokens.keep(self.arranged(best), condensed=self.alignment == "none")

    def arranged(self, best: Slots) -> Slots:
        """Orders the survivors' slots, int32 `[B, K]`, which come best first."""
        return jnp.sort(best, axis=1) if self.order == "position" else best
