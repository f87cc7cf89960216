"""Scores and orders chosen at run time keep exactly the tokens that `Pruning` keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.ablation.evaluate import Ranking, Selectable
from top_jax.pruning import Cut, Pruning, Tokens

RANKINGS = (("clip", 0), ("l2", 0), ("random", 0), ("random", 1), ("uniform", 0))
HALF = Cut(block=1, before=8, kept=4, after=4)


@pytest.fixture(scope="module")
def tokens():
    x = jnp.asarray(np.arange(2 * 9, dtype=np.float32).reshape(2, 9, 1))
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    return Tokens(x=x, residual=-x, positions=positions, cls_index=jnp.full(2, 4, jnp.int32))


@pytest.fixture(scope="module")
def evidence():
    rng = np.random.default_rng(0)
    return {name: jax.device_put(rng.normal(size=(2, 9)).astype(np.float32)) for name in ("clip", "l2")}


def test_same_tokens_as_pruning(quick_programs, tokens, evidence):
    """Both orders are compared; the numbers of whole models are compared in test_run.py."""
    traced = 0

    @jax.jit
    def select(ranking, best_first):
        nonlocal traced
        traced += 1
        chosen = Ranking(ranking, best_first)
        pruning = Selectable(after_blocks=(1,), keep_ratio=0.5, alignment="none", rankings=RANKINGS, chosen=chosen)
        return pruning(tokens, evidence, HALF)

    chosen = [(place, order) for place in range(len(RANKINGS)) for order in ("position", "score")]

    @jax.jit  # all in one program, for the sake of time
    def plain():
        common = {"after_blocks": (1,), "keep_ratio": 0.5, "alignment": "none"}
        rankings = [(*RANKINGS[place], order) for place, order in chosen]
        each = [Pruning(score=score, seed=seed, order=order, **common) for score, seed, order in rankings]
        return [pruning(tokens, evidence, HALF) for pruning in each]

    found = set()
    for (place, order), want in zip(chosen, plain(), strict=True):
        got = select(jnp.int32(place), jnp.bool_(order == "score"))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        found.add(tuple(np.asarray(got.x).ravel().tolist()))
    assert traced == 1
    assert len(found) == len(chosen) - 1  # all differ, but that uniform's best are its first in any order


def test_keeping_everything_changes_nothing(tokens, evidence):
    chosen = Ranking(jnp.int32(0), jnp.bool_(True))
    pruning = Selectable(after_blocks=(1,), alignment="none", rankings=RANKINGS, chosen=chosen)
    assert pruning(tokens, evidence, Cut(1, 8, 8, 8)) is tokens
