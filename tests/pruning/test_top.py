"""Properties of ToP's selection, for any scores."""

from __future__ import annotations

import functools

import hypothesis
import jax
import numpy as np
import pytest
from comparison import in_numpy
from hypothesis import strategies as st

from top_jax.pruning import Cut, Pruning, Tokens

BATCH, PATCHES = 3, 8
# Few shapes (each is compiled), many values: ties and infinities included. XLA's sort treats subnormals as zero.
NUMBER = st.floats(-10, 10, width=32, allow_subnormal=False)
SCORE = st.one_of(st.sampled_from([0.0, 1.0, float("inf"), -float("inf")]), NUMBER)
SCORES = st.lists(SCORE, min_size=BATCH * (PATCHES + 1), max_size=BATCH * (PATCHES + 1))
KEEP = st.sampled_from([1, 3, 8])
FEWER = st.sampled_from([1, 3])  # than all tokens
CLASS_SLOTS = st.lists(st.integers(0, PATCHES), min_size=BATCH, max_size=BATCH)
ALIGNED = st.sampled_from(["hold", "decay"])
few = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)


def tokens(cls_index) -> Tokens:
    """Returns tokens, of NumPy, that carry their own number, at positions whose gaps differ between images."""
    length = PATCHES + (cls_index is not None)
    number = np.arange(BATCH)[:, None] * 100 + np.arange(length)
    x = number[:, :, None].astype(np.float32)
    positions = (np.arange(length) * np.arange(1, BATCH + 1)[:, None]).astype(np.int32)
    cls_index = None if cls_index is None else np.asarray(cls_index, np.int32)
    return Tokens(x=x, residual=-x, positions=positions, cls_index=cls_index)


@functools.cache
def compiled(keep: int, **settings):
    pruning = Pruning(after_blocks=(1,), keep_ratio=0.5, score=settings.pop("score", "clip"), **settings)
    cut = Cut(block=1, before=PATCHES, kept=keep, after=keep)
    return in_numpy(lambda tokens, score: pruning(tokens, {"clip": score}, cut))


def evidence(scores, cls_index) -> np.ndarray:
    grid = np.asarray(scores, np.float32).reshape(BATCH, -1)
    return grid[:, : PATCHES + (cls_index is not None)]


def check_whole(before: Tokens, after: Tokens) -> None:
    """Every kept token comes from its own image, occurs once, and has its own residual and position."""
    slots = np.asarray(after.x[:, :, 0]).astype(int) - np.arange(BATCH)[:, None] * 100
    assert ((slots >= 0) & (slots < before.x.shape[1])).all()
    assert all(len(set(row)) == len(row) for row in slots)
    np.testing.assert_array_equal(after.residual, -after.x)
    np.testing.assert_array_equal(after.positions, np.take_along_axis(np.asarray(before.positions), slots, axis=1))


def assert_equal(got: Tokens, want: Tokens) -> None:
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def first_image(tokens: Tokens) -> Tokens:
    return jax.tree.map(lambda array: array[:1], tokens)


def class_token(tokens: Tokens) -> np.ndarray:
    return np.asarray(tokens.x)[np.arange(BATCH), np.asarray(tokens.cls_index), 0]


@few
@hypothesis.given(scores=SCORES, keep=KEEP, cls_index=CLASS_SLOTS, alignment=ALIGNED)
def test_aligned_tokens_stay_in_order_with_their_class_token(scores, keep, cls_index, alignment):
    before = tokens(cls_index)
    after = compiled(keep, alignment=alignment)(before, evidence(scores, cls_index))
    check_whole(before, after)
    assert after.x.shape[1] == keep + 1
    assert (np.diff(after.positions, axis=1) > 0)[1:].all() and (np.diff(after.x[:, :, 0], axis=1) > 0).all()
    np.testing.assert_array_equal(class_token(after), class_token(before))


@few
@hypothesis.given(scores=SCORES, keep=FEWER, cls_index=CLASS_SLOTS, order=st.sampled_from(["position", "score"]))
def test_none_puts_the_class_token_in_the_middle(scores, keep, cls_index, order):
    before = tokens(cls_index)
    after = compiled(keep, alignment="none", order=order)(before, evidence(scores, cls_index))
    check_whole(before, after)
    np.testing.assert_array_equal(after.cls_index, [keep // 2] * BATCH)
    np.testing.assert_array_equal(class_token(after), class_token(before))
    if order == "position":
        patches = np.delete(np.asarray(after.x[:, :, 0]), keep // 2, axis=1)
        assert (np.diff(patches, axis=1) > 0).all()


@few
@hypothesis.given(scores=SCORES, keep=FEWER, cls_index=CLASS_SLOTS)
def test_the_best_are_kept(scores, keep, cls_index):
    before, score = tokens(cls_index), evidence(scores, cls_index)
    after = compiled(keep, alignment="none", order="score")(before, score)
    patches = np.delete(np.asarray(after.x[:, :, 0]), keep // 2, axis=1).astype(int) % 100
    kept = np.take_along_axis(np.asarray(score), patches, axis=1)
    candidates = np.stack([np.delete(row, slot) for row, slot in zip(np.asarray(score), cls_index, strict=True)])
    np.testing.assert_array_equal(kept, -np.sort(-candidates, axis=1)[:, :keep])  # best first


def test_of_equals_the_earlier_is_kept():
    """A NaN comes first, so that it shows in the outputs; both as in `jax.lax.top_k`."""
    scores = np.tile(np.array([0, 2, 1, 2, np.nan, 1, 2, 0], np.float32), (BATCH, 1))
    after = compiled(5, alignment="hold")(tokens(None), scores)
    np.testing.assert_array_equal(after.x[0, :, 0], [1, 2, 3, 4, 6])


@few
@hypothesis.given(scores=SCORES, others=SCORES, cls_index=CLASS_SLOTS, alignment=st.sampled_from(["none", "hold"]))
def test_images_do_not_influence_each_other(scores, others, cls_index, alignment):
    run, before = compiled(3, alignment=alignment), tokens(cls_index)
    mine, theirs = evidence(scores, cls_index), evidence(others, cls_index)
    after = run(before, mine)
    mixed = run(before, np.concatenate([mine[:1], theirs[1:]]))
    alone = run(first_image(before), mine[:1])
    for other in (mixed, alone):
        assert_equal(first_image(other), first_image(after))


@few
@hypothesis.given(scores=SCORES, keep=KEEP, alignment=ALIGNED)
def test_without_a_class_token(scores, keep, alignment):
    before = tokens(None)
    after = compiled(keep, alignment=alignment)(before, evidence(scores, None))
    check_whole(before, after)
    assert after.cls_index is None and after.x.shape[1] == keep
    assert (np.diff(after.x[:, :, 0], axis=1) > 0).all()


@pytest.mark.parametrize(("alignment", "order"), [("none", "position"), ("none", "score"), ("hold", "position")])
def test_keeping_all_patches_changes_nothing(alignment, order):
    before = tokens([4, 0, 8])
    after = compiled(PATCHES, alignment=alignment, order=order)(before, evidence(range(BATCH * (PATCHES + 1)), [0]))
    assert_equal(after, before)


@pytest.mark.parametrize("score", ["random", "uniform"])
def test_controls_ignore_the_evidence_and_the_batch(score):
    before, run = tokens([4, 4, 4]), compiled(3, score=score)
    before = Tokens(before.x, before.residual, np.tile(before.positions[:1], (BATCH, 1)), before.cls_index)
    first = run(before, np.zeros((BATCH, PATCHES + 1), np.float32))
    again = run(before, np.random.default_rng(0).normal(size=(BATCH, PATCHES + 1)).astype(np.float32))
    assert_equal(first, again)
    np.testing.assert_array_equal(first.positions, np.tile(first.positions[:1], (BATCH, 1)))
    alone = run(first_image(before), np.zeros((1, PATCHES + 1), np.float32))
    np.testing.assert_array_equal(alone.positions, first.positions[:1])


def test_a_second_prune_keeps_the_first_positions():
    before, score = tokens([4, 0, 8]), evidence(range(BATCH * (PATCHES + 1)), [0])
    after = compiled(3, alignment="hold")(compiled(8, alignment="hold")(before, score), score)
    once = compiled(3, alignment="hold")(before, score)
    assert_equal(after, once)
