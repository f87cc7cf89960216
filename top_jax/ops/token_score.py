"""The score of a token from the scan's final output: the paper's and its ablations.

Source: ToP, arXiv 2409.18962, section 4.1 (`clip`) and its ablations.
"""

from __future__ import annotations

from typing import Final

import jax.numpy as jnp

from top_jax.kernels.operands import TOKEN_WORTH
from top_jax.typing import Inner, PerToken

TOKEN_SCORES: Final = tuple(TOKEN_WORTH)


def token_score(y: Inner, score: str) -> PerToken:
    """`[B, L]` score of float32 `[B, L, E]`: mean over channels of max(0, y), y, |y|, or root mean square."""
    return score_of_sums(jnp.sum(TOKEN_WORTH[score](y), axis=-1), score, y.shape[-1])


def score_of_sums(sums: PerToken, score: str, width: int) -> PerToken:
    """The score where the sums over `width` channels of `TOKEN_WORTH` are known."""
    mean = sums / width
    return jnp.sqrt(mean) if score == "l2" else mean
