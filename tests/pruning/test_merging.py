"""`Merging` against a slow version of the published definition, and its properties for any tokens."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import top_jax
from top_jax.errors import InputError
from top_jax.pruning import Cut, Merging, Tokens

BATCH, WIDTH = 3, 4


def published(x: np.ndarray, merged: int) -> list[list[int]]:
    """Applies ToMe's matching to one image's patch tokens `[K, D]`; returns each survivor's tokens, in order."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / norms) if norms else 0.0

    x = x.astype(np.float64)
    groups = {token: [token] for token in range(len(x))}
    edges = []
    for source in range(0, len(x), 2):
        likeness = [cosine(x[source], x[target]) for target in range(1, len(x), 2)]
        if likeness:
            edges.append((-max(likeness), source, 2 * int(np.argmax(likeness)) + 1))
    for _, source, target in sorted(edges)[:merged]:
        groups[target] += groups.pop(source)
    return [groups[token] for token in sorted(groups)]


def means(values: np.ndarray, size: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    return np.stack([np.average(values[group].astype(np.float64), axis=0, weights=size[group]) for group in groups])


@dataclasses.dataclass
class Image:
    """Patch tokens of one image as NumPy arrays, and the class token's state and place among them."""

    x: np.ndarray
    residual: np.ndarray
    positions: np.ndarray
    size: np.ndarray
    source: np.ndarray
    cls: int | None

    def merge(self, merged: int, alignment: str, home: str) -> Image:
        groups = published(self.x, merged)
        heads = [group[0] for group in groups]
        cls = self.cls
        if cls is not None and alignment == "none":
            cls = len(groups) // 2 if home == "middle" else 0
        elif cls is not None:
            cls = sum(head < cls for head in heads)
        return Image(
            x=means(self.x, self.size, groups),
            residual=means(self.residual, self.size, groups),
            positions=self.positions[heads],
            size=np.array([self.size[group].sum() for group in groups]),
            source=np.array([next(i for i, g in enumerate(groups) if s in g) for s in self.source]),
            cls=cls,
        )


def draw(count: int, cls: str | None = None, *, seed: int = 0, dtype: Any = jnp.float32) -> Tokens:
    """Returns tokens of `BATCH` images; the class token is in the `middle`, `first`, or elsewhere in each image."""
    rng = np.random.default_rng((seed, count))
    length = count + (cls is not None)
    x, residual = rng.normal(size=(2, BATCH, length, WIDTH))
    places = {"middle": [count // 2] * BATCH, "first": [0] * BATCH, "anywhere": rng.integers(0, count + 1, BATCH)}
    return Tokens(
        x=jax.device_put(x.astype(dtype)),
        residual=jax.device_put(residual.astype(np.float32)),
        positions=jax.device_put(np.cumsum(rng.integers(1, 4, (BATCH, length)), axis=1, dtype=np.int32)),
        cls_index=None if cls is None else jnp.asarray(places[cls], jnp.int32),
        cls_home="first" if cls == "first" else "middle",
    )


def patches(array: jax.Array | None, tokens: Tokens) -> np.ndarray:
    """Returns the part of `[B, L, ...]` that belongs to patch tokens."""
    assert array is not None
    if tokens.cls_index is None:
        return np.asarray(array)
    return np.stack([np.delete(row, at, 0) for row, at in zip(np.asarray(array), tokens.cls_index, strict=True)])


def class_tokens(array: jax.Array | None, tokens: Tokens) -> np.ndarray:
    assert array is not None and tokens.cls_index is not None
    return np.asarray(array)[np.arange(array.shape[0]), np.asarray(tokens.cls_index)]


def images(tokens: Tokens) -> list[Image]:
    count = tokens.num_patches
    parts = [patches(array, tokens) for array in (tokens.x, tokens.residual, tokens.positions)]
    ones, own = np.ones(count), np.arange(count)
    cls = [None] * BATCH if tokens.cls_index is None else [int(at) for at in tokens.cls_index]
    return [Image(*(part[b] for part in parts), ones, own, cls[b]) for b in range(BATCH)]


@functools.cache
def compiled(*counts: int, alignment: str = "hold") -> Callable[[Tokens], Tokens]:
    """Returns a compiled function that merges down to each count in turn; its tokens are NumPy arrays."""
    return in_numpy(merge_to(*counts, alignment=alignment))


def merge_to(*counts: int, alignment: str = "hold") -> Callable[[Tokens], Tokens]:
    merging = Merging(after_blocks=(1,), keep_ratio=0.5, alignment=alignment)
    merge = lambda tokens, keep: merging(tokens, {}, Cut(1, tokens.num_patches, keep, keep))  # noqa: E731
    return lambda tokens: functools.reduce(merge, counts, tokens)


def assert_same_bits(got: Tokens, want: Tokens) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(mine).view(np.uint8), np.asarray(theirs).view(np.uint8))


COUNTS, PLACES = ((3, 1), (8, 5, 3), (15, 7)), ((None, "hold"), ("first", "hold"), ("anywhere", "none"))
QUICK = (*((counts, "first", "hold") for counts in COUNTS), *((COUNTS[1], *place) for place in PLACES))


@pytest.mark.parametrize(
    "counts, cls, alignment",
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(COUNTS, (None, "first", "anywhere"), ("hold", "none"))
        if case[1:] != (None, "none")
    ],
)
def test_published_definition(counts, cls, alignment):
    unmerged = draw(counts[0], cls)
    tokens = compiled(*counts[1:], alignment=alignment)(unmerged)
    want = images(unmerged)
    for before, keep in zip(counts, counts[1:], strict=False):
        want = [image.merge(before - keep, alignment, tokens.cls_home) for image in want]
    assert tokens.num_patches == counts[-1]
    assert tokens.size is not None and tokens.size.dtype == jnp.float32
    assert tokens.source is not None and tokens.source.dtype == jnp.int32
    assert tokens.source.shape == (BATCH, counts[0])
    for name in ("x", "residual", "positions", "size"):
        got = patches(getattr(tokens, name), tokens)
        np.testing.assert_allclose(got, np.stack([getattr(image, name) for image in want]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tokens.source, [image.source for image in want])
    if cls is None:
        assert tokens.cls_index is None
        return
    np.testing.assert_array_equal(tokens.cls_index, [image.cls for image in want])
    for name in ("x", "residual", "positions"):
        now, then = (class_tokens(getattr(of, name), of) for of in (tokens, unmerged))
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(class_tokens(tokens.size, tokens), 1)


def test_by_hand():
    """Source 4 equals target 1's direction, source 0 is close, source 2 is not; target 1 then stands for three."""
    x = jnp.asarray([[[1, 1], [1, 0], [-1, 0], [0, -1], [3, 0]]], jnp.float32)
    positions = jnp.asarray([[0, 2, 3, 7, 9]], jnp.int32)
    tokens = Tokens(x=x, residual=None, positions=positions, cls_index=None)
    once = compiled(4)(tokens)
    np.testing.assert_array_equal(once.x[0], [[1, 1], [2, 0], [-1, 0], [0, -1]])
    np.testing.assert_array_equal(once.source[0], [0, 1, 2, 3, 1])
    twice = compiled(3)(once)
    np.testing.assert_allclose(twice.x[0], [[5 / 3, 1 / 3], [-1, 0], [0, -1]], rtol=1e-6)
    np.testing.assert_array_equal(twice.positions[0], [2, 3, 7])
    np.testing.assert_array_equal(twice.size[0], [3, 1, 1])
    np.testing.assert_array_equal(twice.source[0], [0, 0, 1, 2, 0])
    assert twice.residual is None and twice.cls_index is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_that_nothing_joins_keep_their_bits(dtype):
    """This holds for tokens of three patches too, although 3 x / 3 is not always x."""
    before = draw(9, "anywhere", dtype=dtype)
    before = jax.tree.map(np.asarray, dataclasses.replace(before, size=np.full((BATCH, 10), 3, np.float32)))
    after = compiled(6)(before)
    untouched = 0
    for b in range(BATCH):
        old_slots = {int(position): slot for slot, position in enumerate(before.positions[b])}
        for slot, position in enumerate(after.positions[b]):
            if after.size[b, slot] == 3:
                untouched += 1
                old = old_slots[int(position)]
                np.testing.assert_array_equal(after.x[b, slot], before.x[b, old])
                np.testing.assert_array_equal(after.residual[b, slot], before.residual[b, old])
    assert 3 * BATCH <= untouched < after.size.size


@pytest.mark.parametrize("cls", [None, "first"])
@pytest.mark.parametrize("count", [1, 7])
def test_keeping_all_changes_nothing(count, cls):
    before = draw(count, cls)
    assert_same_bits(compiled(count, alignment="none")(before), before)
    if count > 1:
        once = compiled(count - 2, alignment="none")(before)
        assert_same_bits(compiled(count - 2, alignment="none")(once), once)


def test_no_device_may_round_or_reorder():
    """Products are full float32, and no operation leaves the order of sums or the sharding to the compiler."""
    program = str(jax.make_jaxpr(merge_to(5))(draw(9, "anywhere")))
    products = program.count("dot_general[")
    assert products == 3  # similarity, x, residual
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
    assert "scatter" not in program and "top_k" not in program


def test_of_equals_the_earlier_are_merged():
    tokens = Tokens(
        x=jnp.asarray(np.ones((1, 7, 2), np.float32)), residual=None, positions=in_raster_order(7), cls_index=None
    )
    after = compiled(5)(tokens)
    np.testing.assert_array_equal(after.positions[0], [1, 3, 4, 5, 6])
    np.testing.assert_array_equal(after.source[0], [0, 0, 0, 1, 2, 3, 4])


def test_a_token_without_direction_is_like_none():
    """It is merged after similar tokens and before opposed ones, and gives no NaN, also in gradients."""
    x = jnp.asarray([[[1, 0], [1, 0], [-1, 0], [1, 0], [0, 0], [0, 0]]], jnp.float32)
    tokens = Tokens(x=x, residual=x, positions=in_raster_order(6), cls_index=None)
    np.testing.assert_array_equal(compiled(5)(tokens).positions[0], [1, 2, 3, 4, 5])
    # Source 2 finds the zero target (0 is more than -1), which comes after it; so both have similarity 0.
    np.testing.assert_array_equal(compiled(4)(tokens).source[0], [0, 0, 3, 1, 2, 3])
    gradient = compiled_gradient(3)
    ones = np.ones((1, 3, 2), np.float32)
    for start in (tokens, dataclasses.replace(tokens, x=jnp.asarray(np.zeros((1, 6, 2), np.float32)))):
        of_x, _ = gradient(start, (ones, ones))
        assert np.isfinite(of_x).all() and of_x.any()
        assert np.isfinite(compiled(3)(start).x).all()


def test_means_are_taken_in_float32():
    """Sums are float32 in both streams and rounded at the end; bfloat16 sums would differ in some channels."""
    x = np.random.default_rng(0).normal(size=(1, 9, 64)).astype(jnp.bfloat16)
    after = compiled(5)(Tokens(x=x, residual=x.astype(np.float32), positions=in_raster_order(9), cls_index=None))
    assert after.x.dtype == jnp.bfloat16 and after.residual.dtype == jnp.float32
    np.testing.assert_array_equal(after.x, after.residual.astype(jnp.bfloat16))
    assert after.size.max() > 2


@functools.cache
def compiled_gradient(keep: int) -> Callable[..., Any]:
    """Returns a function of (tokens, cotangents of x and residual) that gives those of the tokens' x and residual."""

    def pull(tokens: Tokens, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def merge(x: jax.Array, residual: jax.Array) -> tuple[Any, Any]:
            after = merge_to(keep)(dataclasses.replace(tokens, x=x, residual=residual))
            return after.x, after.residual

        return jax.vjp(merge, tokens.x, tokens.residual)[1](cotangents)

    return in_numpy(pull)


@pytest.mark.parametrize("cls", [None, "anywhere"])
def test_gradient_is_that_of_the_means(cls):
    """It is the transpose of the means; the matching has no gradient."""
    before = compiled(7)(draw(9, cls))
    size = patches(before.size, before)
    cotangent = np.random.default_rng(5).normal(size=(BATCH, 5 + (cls is not None), WIDTH)).astype(np.float32)

    pull, after = compiled_gradient(5), compiled(5)(before)
    gradient = pull(before, (cotangent, 2 * cotangent))
    np.testing.assert_array_equal(2 * gradient[0], gradient[1])
    grown = patches(cotangent, after)
    for b in range(BATCH):
        groups = published(patches(before.x, before)[b], 2)
        want = np.zeros((7, WIDTH))
        for survivor, group in enumerate(groups):
            for token in group:
                want[token] = size[b, token] / size[b, group].sum() * grown[b, survivor]
        np.testing.assert_allclose(patches(gradient[0], before)[b], want, rtol=1e-6)
    if cls is not None:
        np.testing.assert_array_equal(class_tokens(gradient[0], before), class_tokens(cotangent, after))


# Few shapes (each is compiled), many values: equal tokens and zeros included.
COUNT = 7
NUMBER = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-8, 8, width=16, allow_subnormal=False))
VALUES = arrays.arrays(np.float32, (BATCH, COUNT + 1, 2), elements=NUMBER)
few = hypothesis.settings(deadline=None, max_examples=25, derandomize=True)


def with_class_token(values: np.ndarray, cls_index: list[int]) -> Tokens:
    places = np.tile(in_raster_order(COUNT + 1), (BATCH, 1))
    return Tokens(x=values, residual=2 * values + 1, positions=places, cls_index=np.asarray(cls_index, np.int32))


def in_raster_order(count: int) -> np.ndarray:
    """Positions `[1, count]` of an image of which nothing is gone."""
    return np.arange(count, dtype=np.int32)[None]


CLASS_SLOTS = st.lists(st.integers(0, COUNT), min_size=BATCH, max_size=BATCH)


@few
@hypothesis.given(
    values=VALUES,
    cls_index=CLASS_SLOTS,
    alignment=st.sampled_from(["none", "decay"]),
)
def test_nothing_is_lost(values, cls_index, alignment):
    before = with_class_token(values, cls_index)
    after = compiled(5, 3, alignment=alignment)(before)
    assert after.size is not None and after.source is not None
    size = patches(after.size, after)
    np.testing.assert_array_equal(size.sum(axis=1), COUNT)
    counted = [np.bincount(row, minlength=3) for row in np.asarray(after.source)]
    np.testing.assert_array_equal(size, counted)
    for name in ("x", "residual"):
        total = np.sum(patches(getattr(after, name), after) * size[:, :, None], axis=1)
        np.testing.assert_allclose(total, patches(getattr(before, name), before).sum(axis=1), rtol=1e-4, atol=1e-4)
        now, then = (class_tokens(getattr(of, name), of) for of in (after, before))
        np.testing.assert_array_equal(now, then)
    places = patches(after.positions, after)
    assert (np.diff(places, axis=1) > 0).all()  # scan order
    if alignment == "none":
        np.testing.assert_array_equal(after.cls_index, [3 // 2] * BATCH)
    else:
        assert (np.diff(after.positions, axis=1) > 0).all()  # the class token too
    ranks = np.argsort(np.argsort(patches(before.positions, before), axis=1), axis=1)
    for b in range(BATCH):  # each remaining token represents itself
        own = [list(patches(before.positions, before)[b]).index(place) for place in places[b]]
        np.testing.assert_array_equal(np.asarray(after.source)[b, ranks[b][own]], np.arange(3))


@few
@hypothesis.given(values=VALUES, others=VALUES, cls_index=CLASS_SLOTS)
def test_images_do_not_influence_each_other(values, others, cls_index):
    run, before = compiled(5, alignment="decay"), with_class_token(values, cls_index)
    mixed = run(with_class_token(np.concatenate([values[:1], others[1:]]), cls_index))
    first = lambda tokens: jax.tree.map(lambda array: array[:1], tokens)  # noqa: E731
    assert_same_bits(first(mixed), first(run(before)))
    assert_same_bits(run(first(before)), first(run(before)))


@pytest.mark.parametrize("count, least", [(1, 1), (2, 1), (3, 1), (4, 2), (15, 7), (16, 8)])
def test_every_source_and_no_more_can_be_merged(count, least):
    assert Merging(after_blocks=(1,), keep_ratio=least / count).schedule(count, 2) == (Cut(1, count, least, least),)
    if least == 1:
        return
    with pytest.raises(InputError, match=f"{least - 1} of {count} .* {least}"):
        Merging(after_blocks=(1,), keep_ratio=(least - 1) / count).schedule(count, 2)


def test_what_is_left_after_a_merge_counts_for_the_next():
    assert Merging(after_blocks=(5, 10), keep_ratio=0.5).schedule(196, 24) == (Cut(5, 196, 98, 98), Cut(10, 98, 49, 49))
    with pytest.raises(InputError, match="keep_ratio=0.4 .* 40 of 98 .* 49"):
        Merging(after_blocks=(5, 10), keep_ratio=(0.5, 0.4)).schedule(196, 24)


def test_a_ratio_of_nothing_names_what_is_possible():
    with pytest.raises(InputError, match="keep_ratio=1e-09"):
        Merging(after_blocks=(1,), keep_ratio=1e-9).schedule(1, 2)


def test_settings():
    assert top_jax.Merging is Merging
    assert [field.name for field in dataclasses.fields(Merging)] == ["after_blocks", "keep_ratio", "alignment"]
    merging = Merging(after_blocks=(1,), keep_ratio=0.5)
    assert merging.needed_evidence is None and merging.alignment == "hold"
    merging.check_evidence(())
    with pytest.raises(InputError, match="alignment='held'"):
        Merging(alignment="held")


def test_sources_follow_a_later_reduction():
    """After another method follows a merge, the patches of a removed token have no source; the others keep theirs."""
    merged = Tokens(
        x=np.zeros((1, 5, 1), np.float32),
        residual=None,
        positions=np.asarray([[0, 2, 4, 5, 6]], np.int32),
        cls_index=np.asarray([2], np.int32),
        size=np.asarray([[2.0, 1.0, 1.0, 3.0, 1.0]], np.float32),
        source=np.asarray([[0, 0, 1, 2, 2, 2, 3]], np.int32),
    )

    @in_numpy
    def keep_twice(tokens, first, second):
        kept = tokens.keep(first, condensed=False)
        return kept, kept.keep(second, condensed=True)

    kept, again = keep_twice(merged, np.asarray([[1, 3]], np.int32), np.asarray([[2]], np.int32))
    np.testing.assert_array_equal(kept.source, [[-1, -1, 0, 1, 1, 1, -1]])
    np.testing.assert_array_equal(kept.cls_index, [1])
    np.testing.assert_array_equal(again.source, [[-1, -1, -1, 0, 0, 0, -1]])
