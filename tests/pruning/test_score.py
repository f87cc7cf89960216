from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.pruning import SCAN_EVIDENCE, scan_evidence
from top_jax.pruning.score import token_scores


def test_reductions():
    y = jnp.asarray([[[-4.0, 2.0, 0.0, 6.0], [-1.0, -1.0, -1.0, -1.0]]])
    evidence = scan_evidence(y, jnp.asarray([[0.5, 0.25]]))
    want = {"clip": [2, 0], "noclip": [1, -1], "l1": [3, 1], "l2": [np.sqrt(14), 1], "delta": [0.5, 0.25]}
    assert evidence.keys() == want.keys() == set(SCAN_EVIDENCE)
    for name, values in want.items():
        np.testing.assert_allclose(evidence[name], [values], rtol=1e-6)


def test_bfloat16_is_reduced_in_float32():
    evidence = scan_evidence(jnp.full((1, 2, 1000), 1 + 2**-7, jnp.bfloat16), jnp.zeros((1, 2)))
    assert {array.dtype for array in evidence.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(evidence["clip"], 1 + 2**-7, rtol=1e-5)


def score(name, count, keep, positions=None, **settings):
    slots = jnp.arange(count, dtype=jnp.int32)[None]
    positions = slots if positions is None else positions
    return np.asarray(token_scores(name, {}, positions, slots, keep=keep, **{"seed": 0, "block": 1, **settings}))[0]


@pytest.mark.parametrize("count, keep", [(10, 1), (10, 3), (10, 5), (10, 10), (196, 157), (7, 4)])
def test_uniform_is_evenly_spaced(count, keep):
    chosen = np.flatnonzero(score("uniform", count, keep))
    assert len(chosen) == keep
    gaps = np.diff(chosen)
    assert keep < 2 or gaps.max() - gaps.min() <= 1


def test_random_depends_on_seed_and_block_alone():
    first = score("random", 50, 5)
    np.testing.assert_array_equal(first, score("random", 50, 40))
    assert (first != score("random", 50, 5, seed=1)).all()
    assert (first != score("random", 50, 5, block=2)).all()
    assert 0.3 < first.mean() < 0.7 and first.std() > 0.2


def test_random_goes_with_the_place():
    places = jnp.asarray([[3, 7, 20]], jnp.int32)
    np.testing.assert_array_equal(score("random", 3, 1, positions=places), score("random", 50, 5)[[3, 7, 20]])
