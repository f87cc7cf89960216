"""EViT: keeps the tokens that the class token attends to most, and fuses the others into one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from top_jax.pruning.reduction import Cut, Reduction
from top_jax.pruning.score import Evidence, best_patches, check_ranking, token_scores
from top_jax.pruning.tokens import Tokens
from top_jax.typing import Array, Embedded, Float, PerToken, Slots, SlotScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evit(Reduction):
    """EViT on DeiT; on ViM and PlainMamba, with a scan's score, the naive baseline.

    The best tokens stay, sorted best first, followed by one token fused from all others. The fused token has no
    position in the image (-1) and is a candidate like any other in the next reduction. A scan reads the remaining
    tokens as a smaller image: the alignment is `none`.

    As in the official code, the fused token is the sum of the others, weighted by the class token's attention to them
    and not normalised. Only attention gives such weights, which sum to less than one. With any other score the fused
    token is the mean of the others, weighted by the number of patches that each stands for.

    Attributes:
        after_blocks, keep_ratio: as in `Reduction`. The paper's after_blocks=(4, 7, 10) with keep_ratio=0.7 leaves
            139, 99 and 71 of 196 tokens, the fused one included. A ratio that keeps every token changes nothing.
        score: the token score: `attention` (DeiT), or one of `Pruning`'s.
        fuse: whether to append the fused token; otherwise the others are dropped.
        order: `score` sorts the survivors best first, as in the official code; `position` keeps their order.
        seed: seed of the control `random`.

    Raises:
        InputError: a value out of range.

    Source: arXiv 2202.07800; youweiliang/evit, evit.py, `Block.forward`.
    """

    alignment: str = dataclasses.field(default="none", init=False)
    score: str = "attention"
    fuse: bool = True
    order: str = "score"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranking(self.score, self.order, self.seed)

    @property
    def needed_evidence(self) -> str:
        """Name of the score."""
        return self.score

    def cut(self, block: int, before: int, ratio: float) -> Cut:
        """Returns one entry of the schedule; the fused token counts in `after`."""
        cut = super().cut(block, before, ratio)
        fused = self.fuse and cut.kept < before
        return dataclasses.replace(cut, after=cut.kept + 1) if fused else cut

    def scores(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> SlotScores:
        """Returns `score` of the patch tokens, including a token fused earlier."""
        slots, seed = tokens.patch_slots(), self.seed
        return token_scores(self.score, evidence, tokens.positions, slots, keep=cut.kept, seed=seed, block=cut.block)

    def __call__(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> Tokens:
        """Keeps the best patch tokens of each image and fuses the others into one."""
        if cut.kept == cut.before:
            return tokens
        ranked = best_patches(self.scores(tokens, evidence, cut), tokens.patch_slots())
        kept, dropped = ranked[:, : cut.kept], ranked[:, cut.kept :]
        if self.order == "position":
            kept = jnp.sort(kept, axis=1)
        if self.fuse:
            kept = jnp.pad(kept, ((0, 0), (0, 1)), constant_values=tokens.positions.shape[1])  # its slot
            attention = evidence["attention"] if self.score == "attention" else None
            tokens = _append_fused(tokens, dropped, attention)
        return tokens.keep(kept, condensed=True)


def _append_fused(tokens: Tokens, dropped: Slots, attention: PerToken | None) -> Tokens:
    """Appends the token fused from those at `dropped`: their sum weighted by attention, or else their mean."""

    def total(array: Embedded | None) -> Float[Array, "B D"] | None:
        if array is None:
            return None
        others = jnp.take_along_axis(array, dropped[:, :, None], axis=1).astype(jnp.float32)
        return jnp.einsum("bk,bkd->bd", weights, others, precision=jax.lax.Precision.HIGHEST)

    sizes = None if tokens.size is None else jnp.take_along_axis(tokens.size, dropped, axis=1)
    if attention is not None:
        weights = jnp.take_along_axis(attention, dropped, axis=1)
    else:
        patches = jnp.ones(dropped.shape, jnp.float32) if sizes is None else sizes
        weights = patches / jnp.sum(patches, axis=1, keepdims=True)
    x = total(tokens.x)
    assert x is not None
    return tokens.append(x, total(tokens.residual), None if sizes is None else jnp.sum(sizes, axis=1))
