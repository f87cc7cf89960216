"""Token scores (the paper's, its ablations, those of other papers, two controls), and ranking tokens by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.ops.directions import TOKEN_SCORES, token_score
from top_jax.typing import Inner, PerChannel, PerToken, Positions, Slots, SlotScores
from top_jax.values import SEEDS, one_of, whole

CONTROLS: Final = ("random", "uniform")
SCAN_EVIDENCE: Final = (*TOKEN_SCORES, "delta")
SCORES: Final = (*SCAN_EVIDENCE, "attention", *CONTROLS)
ORDERS: Final = ("position", "score")

Evidence = Mapping[str, PerToken]
"""A block's evidence about its tokens: name -> float32 [B, L]. Under jit, unused entries are never computed."""


def check_ranking(score: str, order: str, seed: int) -> None:
    """Raises InputError unless `score` is one of `SCORES`, `order` one of `ORDERS`, and `seed` a seed."""
    whole("seed", seed, *SEEDS)
    for name, value, known in (("score", score, SCORES), ("order", order, ORDERS)):
        one_of(name, value, known)


def scan_evidence(y: Inner, time_step: PerToken) -> Evidence:
    """Returns the scores that follow from a scan, under the names `SCAN_EVIDENCE`.

    Args:
        y: `[B, L, E]` sum over all directions, each in image order, after the gate SiLU(z).
        time_step: float32 `[B, L]` sum over all directions of `mean_time_step`, each in image order.

    Returns:
        One float32 `[B, L]` per score. `clip` is the paper's S = mean_e max(0, y_e). `delta` is MTR's: the time step
        with which the scans read the token, the mean over channels of delta after softplus, summed over the scans. A
        large one lets the token change the state; a small one preserves the state.

    Source of `delta`: MTR, arXiv 2507.14042, known to us from a public summary, not from the paper. MTR then splits the
    tokens into kept ones, merge targets and merge sources. We found no published sizes of these groups, so only the
    score of MTR is implemented.
    """
    # Scores only select tokens; no gradient flows through them.
    y, time_step = jax.lax.stop_gradient((y.astype(jnp.float32), time_step))
    return {**{name: token_score(y, name) for name in TOKEN_SCORES}, "delta": time_step}


def mean_time_step(delta: Inner, delta_bias: PerChannel) -> PerToken:
    """Returns one scan's time step, float32 `[B, L]`: the mean over channels of softplus(delta + delta_bias)."""
    delta = delta.astype(jnp.float32) + delta_bias.astype(jnp.float32)[None, None, :]
    return jnp.mean(jax.nn.softplus(delta), axis=-1)


def best_patches(scores: SlotScores, slots: Slots) -> Slots:
    """Sorts the slots `[B, K]` of each image by score, best first; equal scores stay in the order of their slots.

    Does not use jax.lax.top_k: on a mesh it gathers the scores of the whole batch, while XLA partitions a sort.
    """
    best = jnp.argsort(scores, axis=1, stable=True, descending=True)
    return jnp.take_along_axis(slots, best, axis=1)


def token_scores(
    name: str, evidence: Evidence, positions: Positions, slots: Slots, *, keep: int, seed: int, block: int
) -> SlotScores:
    """Returns the scores of the patch tokens; the class token is not a candidate.

    Args:
        name: one of `SCORES`.
        evidence: the block's evidence about the tokens.
        positions: int32 `[B, L]` indices in the unpruned sequence.
        slots: int32 `[B, K]` indices of the patch tokens along L.
        keep: number of tokens that will be kept (`uniform` spaces them evenly).
        seed: seed of `random`.
        block: 1-based block after which tokens are scored (`random` draws again after each).

    Returns:
        float32 `[B, K]`; a larger score is more important.
    """
    if name == "random":
        return _random_by_position(jnp.take_along_axis(positions, slots, axis=1), seed, block)
    if name == "uniform":
        return jnp.broadcast_to(_evenly_spaced(slots.shape[1], keep)[None, :], slots.shape)
    return jnp.take_along_axis(evidence[name], slots, axis=1)


def _random_by_position(positions: Positions, seed: int, block: int) -> PerToken:
    """Draws one number per position of the image, so that the choice does not depend on the rest of the batch."""
    key = jax.random.fold_in(jax.random.key(seed), block)
    draw = lambda position: jax.random.uniform(jax.random.fold_in(key, position))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(positions)


def _evenly_spaced(count: int, keep: int) -> np.ndarray:
    """Returns 1.0 for `keep` evenly spaced ranks out of `count`, else 0.0."""
    edges = np.arange(count + 1) * keep // count
    return (edges[1:] > edges[:-1]).astype(np.float32)
