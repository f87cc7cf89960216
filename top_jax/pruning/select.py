"""Which tokens stay: per-image top-k with static shapes, then one gather."""

from __future__ import annotations

import jax.numpy as jnp

from top_jax.pruning.schedule import Pruning
from top_jax.pruning.score import Evidence, token_scores
from top_jax.pruning.tokens import Tokens
from top_jax.typing import ClassIndex, Positions, Slots


def prune(tokens: Tokens, evidence: Evidence, pruning: Pruning, *, block: int, keep: int) -> Tokens:
    """Keeps the `keep` best patch tokens of each image, and its class token.

    Args:
        tokens: L tokens per image.
        evidence: of the block just run.
        pruning: score, order and alignment.
        block: 1-based number of that block.
        keep: K, patch tokens to keep.

    Returns:
        K tokens, or K + 1 with a class token. `hold` and `decay` keep the scan's order; `none` puts the class token
        back in the middle, slot K // 2, as in a smaller image.
    """
    slots = tokens.patch_slots()
    scores = token_scores(pruning.score, evidence, tokens.positions, slots, keep=keep, seed=pruning.seed, block=block)
    # Not jax.lax.top_k: for it a program over a mesh gathers the scores of the whole batch, while XLA splits a sort.
    best = jnp.argsort(scores, axis=1, stable=True, descending=True)[:, :keep]
    kept = jnp.take_along_axis(slots, best, axis=1)
    if pruning.order == "position":
        kept = jnp.sort(kept, axis=1)
    if tokens.cls_index is None:
        return tokens.take(kept, None)
    if pruning.alignment == "none":
        return tokens.take(*_class_in_the_middle(kept, tokens.cls_index))
    return tokens.take(*_class_in_its_place(kept, tokens.cls_index))


def _class_in_its_place(kept: Slots, cls_index: ClassIndex) -> tuple[Positions, ClassIndex]:
    slots = jnp.sort(jnp.concatenate([kept, cls_index[:, None]], axis=1), axis=1)
    return slots, jnp.sum(kept < cls_index[:, None], axis=1, dtype=cls_index.dtype)


def _class_in_the_middle(kept: Slots, cls_index: ClassIndex) -> tuple[Positions, ClassIndex]:
    middle = kept.shape[1] // 2
    slots = jnp.concatenate([kept[:, :middle], cls_index[:, None], kept[:, middle:]], axis=1)
    return slots, jnp.full_like(cls_index, middle)
