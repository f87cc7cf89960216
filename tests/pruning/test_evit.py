"""`Evit` on tokens: against the method written out in NumPy, for any scores."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy
from hypothesis import strategies as st

from top_jax.errors import InputError
from top_jax.pruning import Cut, Evit, Pruning, Tokens

BATCH, PATCHES, WIDTH = 3, 8, 2
NUMBER = st.floats(0, 1, width=32, allow_subnormal=False)
SCORES = st.lists(st.one_of(st.sampled_from([0.0, 0.5]), NUMBER), min_size=BATCH * 9, max_size=BATCH * 9)
few = hypothesis.settings(deadline=None, max_examples=15, derandomize=True)


def tokens(home: str | None, size: bool = False) -> Tokens:
    """Returns tokens, of NumPy, with random states and the class token at `home` (None: without one)."""
    rng = np.random.default_rng(0)
    length = PATCHES + (home is not None)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return Tokens(
        x=draw(BATCH, length, WIDTH),
        residual=draw(BATCH, length, WIDTH),
        positions=np.tile(np.arange(length, dtype=np.int32)[None], (BATCH, 1)),
        cls_index=None if home is None else np.full((BATCH,), {"first": 0, "middle": 4}[home], np.int32),
        size=rng.integers(1, 5, (BATCH, length)).astype(np.float32) if size else None,
        cls_home=home or "middle",
    )


def evidence(scores, length: int) -> np.ndarray:
    return np.asarray(scores, np.float32).reshape(BATCH, -1)[:, :length]


@functools.cache
def compiled(keep_ratio: float, **settings):
    evit = Evit(after_blocks=(1, 2), keep_ratio=keep_ratio, **settings)
    return cut_down(evit, evit.cut(1, PATCHES, keep_ratio))


@functools.cache
def cut_down(evit: Evit | Pruning, cut: Cut):
    """Returns a compiled function of (tokens, score); its tokens are NumPy arrays."""
    return in_numpy(lambda tokens, score: evit(tokens, {evit.score: score}, cut))


def expected(before: Tokens, scores, best: int, evit: Evit) -> dict[str, np.ndarray]:
    """Computes x, residual, positions and size of one image at a time, in float64."""
    made = {"x": [], "residual": [], "positions": [], "size": []}
    for image in range(BATCH):
        cls = None if before.cls_index is None else int(before.cls_index[image])
        patches = [slot for slot in range(before.x.shape[1]) if slot != cls]
        row = np.asarray(scores[image], np.float64)
        ranked = sorted(patches, key=lambda slot: -row[slot])  # stable: the earlier of two equals first
        kept, dropped = ranked[:best], ranked[best:]
        kept = kept if evit.order == "score" else sorted(kept)
        size = np.ones(len(row)) if before.size is None else np.asarray(before.size[image], np.float64)
        weights = row[dropped] if evit.score == "attention" else size[dropped] / size[dropped].sum()
        place = None if cls is None else 0 if before.cls_home == "first" else (best + evit.fuse) // 2
        for name, column in (("x", before.x), ("residual", before.residual), ("positions", before.positions)):
            values = np.asarray(column[image], np.float64)
            rest = [-1.0] if name == "positions" else [weights @ values[dropped]]
            line = [*values[kept], *(rest if evit.fuse else [])]
            made[name].append(line if place is None else [*line[:place], values[cls], *line[place:]])
        line = [*size[kept], *([size[dropped].sum()] if evit.fuse else [])]
        made["size"].append(line if place is None else [*line[:place], size[cls], *line[place:]])
    return {name: np.asarray(rows) for name, rows in made.items()}


@pytest.mark.parametrize(
    "home, size, settings",
    [
        ("first", False, dict()),
        ("first", True, dict(order="position")),
        ("middle", False, dict(score="clip")),
        ("middle", True, dict(score="clip", fuse=False)),
        (None, True, dict(score="clip", order="position")),
    ],
)
@few
@hypothesis.given(scores=SCORES, keep=st.sampled_from([(0.1, 1), (0.5, 4), (0.8, 7)]))
def test_against_numpy(home, size, settings, scores, keep):
    ratio, best = keep
    before = tokens(home, size)
    score = evidence(scores, before.x.shape[1])
    after = compiled(ratio, **settings)(before, score)
    want = expected(before, score, best, Evit(**settings))
    for name in ("x", "residual"):
        np.testing.assert_allclose(getattr(after, name), want[name], atol=2e-6)
    np.testing.assert_array_equal(after.positions, want["positions"])
    if size:
        np.testing.assert_array_equal(after.size, want["size"])
    else:
        assert after.size is None
    if home is not None:
        place = 0 if home == "first" else after.num_patches // 2
        np.testing.assert_array_equal(after.cls_index, place)
        np.testing.assert_array_equal(after.x[:, place], before.x[:, 0 if home == "first" else 4])


def test_counts():
    evit = Evit(after_blocks=(4, 7, 10), keep_ratio=0.7)
    assert evit.schedule(196, 12) == (Cut(4, 196, 138, 139), Cut(7, 139, 98, 99), Cut(10, 99, 70, 71))  # the paper's
    dropping, dense = dataclasses.replace(evit, fuse=False), dataclasses.replace(evit, keep_ratio=1.0)
    assert dropping.schedule(196, 12) == (Cut(4, 196, 138, 138), Cut(7, 138, 97, 97), Cut(10, 97, 68, 68))
    assert dense.schedule(196, 12) == tuple(Cut(block, 196, 196, 196) for block in (4, 7, 10))
    assert evit.cut(1, 10, 0.95) == Cut(1, 10, 10, 10)
    assert evit.cut(1, 10, 0.9) == Cut(1, 10, 9, 10)  # all but one stay; that one is fused alone
    assert evit.cut(1, 10, 0.8) == Cut(1, 10, 8, 9)
    assert evit.cut(1, 100, 0.55) == Cut(1, 100, 55, 56)  # no extra token from a rounding error
    assert Evit(fuse=False).cut(1, 100, 0.55) == Cut(1, 100, 55, 55)


@pytest.mark.parametrize("fuse", [True, False])
def test_no_token_left(fuse):
    with pytest.raises(InputError, match="keep_ratio=1e-08 .* after block 1"):
        Evit(after_blocks=(1,), keep_ratio=1e-8, fuse=fuse).schedule(4, 6)


@pytest.mark.parametrize("settings", [dict(keep_ratio=1.0), dict(keep_ratio=0.9), dict(keep_ratio=1.0, fuse=False)])
def test_a_ratio_that_keeps_everything_returns_the_tokens(settings):
    """It keeps their order too, which the scores would change."""
    before = jax.tree.map(jnp.asarray, tokens("first"))
    evit = Evit(after_blocks=(1,), **settings)
    cut = Cut(1, PATCHES, PATCHES, PATCHES)
    assert evit.schedule(PATCHES, 2) == (cut,)
    assert evit(before, {"attention": before.x[:, :, 0]}, cut) is before


def test_all_but_one_is_not_all():
    """7 stay, and the eighth, fused alone, becomes itself times its attention."""
    before, score = tokens("first"), np.tile(np.arange(9, dtype=np.float32)[None] / 9, (BATCH, 1))
    after = cut_down(Evit(after_blocks=(1,), keep_ratio=0.8), Cut(1, 8, 7, 8))(before, score)
    np.testing.assert_array_equal(after.positions[0], [0, 8, 7, 6, 5, 4, 3, 2, -1])
    np.testing.assert_allclose(after.x[:, -1], before.x[:, 1] / 9, rtol=1e-6)


@pytest.mark.parametrize("order", ["score", "position"])
def test_the_fused_token_is_a_candidate_like_any_other(order):
    evit = Evit(after_blocks=(1, 2), keep_ratio=0.5, order=order)
    equal = np.full((BATCH, 9), 0.1, np.float32)
    first = cut_down(evit, Cut(1, 8, 4, 5))(tokens("first"), equal)  # 1, 2, 3, 4, fused
    np.testing.assert_array_equal(first.positions, [[0, 1, 2, 3, 4, -1]] * BATCH)
    liked = np.asarray([[0.0, 0.1, 0.2, 0.3, 0.25, 0.9]] * BATCH, np.float32)
    again = cut_down(evit, Cut(2, 5, 3, 4))
    kept = again(first, liked)  # 3 of 5, and a new one of the first two
    np.testing.assert_array_equal(kept.positions[0], [0, -1, 3, 4, -1] if order == "score" else [0, 3, 4, -1, -1])
    np.testing.assert_array_equal(kept.x[:, 1 if order == "score" else 3], first.x[:, 5])
    np.testing.assert_allclose(kept.x[:, 4], 0.1 * first.x[:, 1] + 0.2 * first.x[:, 2], atol=1e-6)
    liked[:, 5] = 0.05
    gone = again(first, liked)
    np.testing.assert_array_equal(gone.positions[0], [0, 3, 4, 2, -1] if order == "score" else [0, 2, 3, 4, -1])
    np.testing.assert_allclose(gone.x[:, 4], 0.1 * first.x[:, 1] + 0.05 * first.x[:, 5], atol=1e-6)


def test_gradients_reach_what_was_fused_and_its_weights():
    """Gradients flow through the attention that weights the others, as in the official code."""
    before, evit = tokens("first"), Evit(after_blocks=(1, 2), keep_ratio=0.5)
    score = np.random.default_rng(1).uniform(size=(BATCH, 9)).astype(np.float32)

    def fused(x, score):
        traced = dataclasses.replace(jax.tree.map(jnp.asarray, before), x=x)
        return jnp.sum(evit(traced, {"attention": score}, evit.cut(1, PATCHES, 0.5)).x[:, -1])

    by_x, by_score = in_numpy(jax.grad(fused, argnums=(0, 1)))(before.x, score)
    worst = np.argsort(np.asarray(score)[:, 1:], axis=1)[:, :4] + 1
    for image, dropped in enumerate(worst):
        np.testing.assert_allclose(by_score[image, dropped], before.x[image, dropped].sum(-1), rtol=1e-5)
        np.testing.assert_allclose(by_x[image, dropped], np.tile(score[image, dropped][:, None], 2), rtol=1e-6)
        assert np.count_nonzero(by_score[image]) == 4 and np.count_nonzero(by_x[image, :, 0]) == 4


def test_controls_rank_as_in_top_and_fuse_the_mean():
    before = tokens("first")
    settings = dict(after_blocks=(1,), keep_ratio=0.5, score="random", seed=3)
    score = np.zeros((BATCH, 9), np.float32)  # which a control does not look at
    after = cut_down(Evit(**settings, order="position"), Cut(1, 8, 4, 5))(before, score)
    top = cut_down(Pruning(**settings), Cut(1, 8, 4, 4))(before, score)
    np.testing.assert_array_equal(after.positions[:, :-1], top.positions)
    dropped = [slot for slot in range(9) if slot not in top.positions[0].tolist()]
    np.testing.assert_allclose(after.x[:, -1], np.asarray(before.x)[:, dropped].mean(1), atol=1e-6)
    other = cut_down(Evit(**{**settings, "seed": 4}, order="position"), Cut(1, 8, 4, 5))(before, score)
    assert (other.positions != after.positions).any()
    last = Evit(after_blocks=(1, 2), keep_ratio=0.5, score="random")
    cut_down(last, Cut(2, 5, 3, 4))(after, score[:, :6])  # position -1 draws too


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(score="best"), "score='best'"),
        (dict(order="best"), "order='best'"),
        (dict(after_blocks=(5, 3)), r"after_blocks=\(5, 3\)"),
        (dict(after_blocks=(5,), keep_ratio=0.0), "keep_ratio=0.0"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Evit(**settings)


def test_a_scan_reads_a_smaller_image():
    assert Evit().alignment == "none"
    with pytest.raises(TypeError, match="alignment"):
        Evit(alignment="hold")


@pytest.mark.parametrize(
    "score, offered, message",
    [
        ("attention", ("clip", "l1"), "score='attention' .* clip, l1, random, uniform"),
        ("clip", ("attention",), "score='clip' .* attention, random, uniform"),
    ],
)
def test_evidence_that_a_model_does_not_give(score, offered, message):
    Evit(score=score).check_evidence(offered)  # the dense model needs none
    Evit(after_blocks=(1,), keep_ratio=0.5, score="random").check_evidence(offered)
    with pytest.raises(InputError, match=message):
        Evit(after_blocks=(1,), keep_ratio=0.5, score=score).check_evidence(offered)
