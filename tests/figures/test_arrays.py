"""The arrays that are drawn, against what the hand-made examination says."""

from __future__ import annotations

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.examine import arrays_of


def changed(examination, **own):
    """The examination with other parts of the pruned trace."""
    trace = examination.own._replace(**own)
    return examination._replace(traces={**examination.traces, examination.configured: trace})


def test_kept_tokens(examination):
    kept = arrays_of(examination, 6)
    assert kept["after_blocks"].tolist() == [1] and kept["tokens"].tolist() == [3] and kept["fused"].tolist() == [0]
    assert kept["source"].tolist() == [[0, -1, -1, 1, -1, 2]]
    dense = arrays_of(examination._replace(configured="dense"), 6)
    assert dense["source"].shape == dense["kept"].shape == (0, 6) and dense["tokens"].shape == (0,)


def test_scores_lie_where_their_tokens_are(examination):
    stage = examination.own.stages[1]
    later = stage._replace(candidates=np.array([[4, -2, 0]]), scores=np.array([[0.1, 0.5, 0.3]], np.float32))
    arrays = arrays_of(changed(examination, stages={1: stage, 2: later}), 6)
    np.testing.assert_array_equal(arrays["scores"][0], stage.scores[0])
    nan = np.nan
    np.testing.assert_array_equal(arrays["scores"][1], np.array([0.3, nan, nan, nan, 0.1, nan], np.float32))
    assert arrays["kept"][0].tolist() == [True, False, False, True, False, True]
    assert "scores" not in arrays_of(changed(examination, stages={1: stage._replace(scores=None)}), 6)


def test_paths_and_their_gaps(examination):
    arrays = arrays_of(examination, 6)
    assert arrays["path/hold"].tolist() == [[0, CLASS, 3, 5], [5, 3, CLASS, 0]]
    assert arrays["gaps/hold"].tolist() == [[0, 2, 0, 1], [0, 1, 0, 2]]
    assert arrays["path/none, score order"][0].tolist() == [5, CLASS, 0, 3]
    assert not arrays["gaps/none, score order"].any() and not arrays["gaps/dense"].any()
    alone = arrays_of(examination._replace(traces={"hold": examination.own}), 6)
    assert not any(name.startswith(("path", "gaps")) for name in alone)


def test_attention_of_the_class_token_over_its_mean(examination):
    arrays = arrays_of(examination, 6)
    keys = {f"{name}/{block}" for name in examination.traces for block in (1, 2)}
    for kind in ("attention", "places", "attention_map"):
        assert {name.partition("/")[2] for name in arrays if name.startswith(f"{kind}/")} == keys
    # Row of the class token, second of four: 5 6 7 8, of which 6 is its own.
    seen = np.array([5, 7, 8]) / np.mean([5, 7, 8])
    weights = arrays["attention_map/hold/2"]
    np.testing.assert_allclose(weights[[0, 3, 5]], seen, rtol=1e-6)
    assert np.isnan(weights[[1, 2, 4]]).all()
    unaligned = arrays["attention_map/none, score order/2"]
    np.testing.assert_allclose(unaligned[[5, 0, 3]], seen, rtol=1e-6)


def test_attention_of_the_average_token(examination):
    block = examination.own.blocks[2]._replace(places=np.array([[0, 1, 3, 5]]))
    trace = examination.own._replace(blocks={2: block})
    weights = arrays_of(examination._replace(traces={"hold": trace}, blocks=(2,)), 6)["attention_map/hold/2"]
    np.testing.assert_allclose(weights[[0, 1, 3, 5]], np.array([7, 8, 9, 10]) / 8.5, rtol=1e-6)
