"""How important is a token: the paper's score, its ablations and two controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError
from top_jax.ops.token_score import TOKEN_SCORES, token_score
from top_jax.typing import Inner, PerToken, Positions, Slots, SlotScores

CONTROLS: Final = ("random", "uniform")
SCORES: Final = (*TOKEN_SCORES, *CONTROLS)

Evidence = Mapping[str, PerToken]
"""What a block tells about its tokens: name -> float32 [B, L]. Under jit whatever no score reads costs nothing."""


def output_evidence(y: Inner) -> Evidence:
    """Evidence from the scan's final output.

    Args:
        y: `[B, L, E]` sum over all directions, each in image order, after the gate SiLU(z).

    Returns:
        One float32 `[B, L]` per reduction; `clip` is the paper's S = mean_e max(0, y_e).
    """
    y = y.astype(jnp.float32)
    return {name: token_score(y, name) for name in TOKEN_SCORES}


def token_scores(
    name: str, evidence: Evidence, positions: Positions, slots: Slots, *, keep: int, seed: int, block: int
) -> SlotScores:
    """Scores of the patch tokens; the class token is no candidate.

    Args:
        name: one of `SCORES`.
        evidence: what the block returned.
        positions: int32 `[B, L]` places in the unpruned scan.
        slots: int32 `[B, K]` where the patch tokens sit along L.
        keep: tokens that will be kept (`uniform` spaces them evenly).
        seed: of `random`.
        block: 1-based block after which tokens are scored (`random` draws anew after each).

    Returns:
        float32 `[B, K]`, larger is more important.

    Raises:
        InputError: the block gives no such evidence.
    """
    if name == "random":
        return _random_by_position(jnp.take_along_axis(positions, slots, axis=1), seed, block)
    if name == "uniform":
        return jnp.broadcast_to(_evenly_spaced(slots.shape[1], keep)[None, :], slots.shape)
    if name not in evidence:
        raise InputError(f"score={name!r}: this model's blocks give only {', '.join((*evidence, *CONTROLS))}.")
    return jnp.take_along_axis(evidence[name], slots, axis=1)


def _random_by_position(positions: Positions, seed: int, block: int) -> PerToken:
    """One draw per place of the image, so that an image's tokens do not depend on the rest of its batch."""
    key = jax.random.fold_in(jax.random.key(seed), block)
    draw = lambda position: jax.random.uniform(jax.random.fold_in(key, position))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(positions)


def _evenly_spaced(count: int, keep: int) -> np.ndarray:
    """1.0 for `keep` evenly spaced ranks of `count`, else 0.0."""
    edges = np.arange(count + 1) * keep // count
    return (edges[1:] > edges[:-1]).astype(np.float32)
