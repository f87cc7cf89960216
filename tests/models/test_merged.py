"""Backbones that merge tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from small_models import random_model

from top_jax.errors import InputError
from top_jax.models import Features, to_grid
from top_jax.pruning import Merging

GRID, PATCHES, KEPT = (3, 5), 15, (9, 6)  # ceil(0.6 * 15), ceil(0.6 * 9)
SIZES = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_classes=5)
FAMILIES = {
    "vim_tiny": dict(d_state=3),
    "plain_mamba_l1": dict(d_state=3, layers_with_dwconv=(0, 2)),
    "deit_tiny": dict(num_heads=2),
}
SCANNED = ("vim_tiny", "plain_mamba_l1")
CASES = [
    *((name, "hold") for name in FAMILIES),
    *(pytest.param((name, how), marks=pytest.mark.slow) for name in SCANNED for how in ("none", "decay")),
]


def make(name: str, **overrides: Any):
    """Builds a small model with random weights."""
    return random_model(name, scale=0.4, **{**SIZES, **FAMILIES[name], **overrides})


def merging(alignment: str = "hold", keep_ratio: float = 0.6) -> Merging:
    return Merging(after_blocks=(1, 2), keep_ratio=keep_ratio, alignment=alignment)


@pytest.fixture(scope="module")
def images():
    return jax.device_put(np.random.default_rng(1).normal(size=(3, 12, 20, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def forward(quick_jit):
    """(model, images) -> (logits, features)."""

    def run(model, images):
        features = model.features(images, stages=(1, 2))
        return model.classify(features), features

    return quick_jit(run)


@pytest.fixture(scope="module")
def dense(forward, images):
    return functools.cache(lambda name: forward(make(name), images))


@dataclasses.dataclass
class Case:
    name: str
    model: Any
    logits: jax.Array
    features: Features
    others: tuple[jax.Array, Features]  # (logits, features) of a batch in which only the first image is the same
    traces: int


@pytest.fixture(scope="module")
def run_case(quick_jit, images):
    """Each case is compiled once, for all tests."""

    @functools.cache
    def run(name: str, alignment: str) -> Case:
        traces = []

        def forward(model, images):
            traces.append(images.shape)
            features = model.features(images, stages=(1, 2))
            return model.classify(features), features

        model, jitted = make(name, pruning=merging(alignment)), quick_jit(forward)
        other = np.asarray(images).copy()
        other[1:] = 1 - 3 * other[1:]
        out, others = (jax.tree.map(np.asarray, jitted(model, batch)) for batch in (images, jnp.asarray(other)))
        return Case(name, model, *out, others, len(traces))

    return run


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, run_case):
    return run_case(*request.param)


def test_every_patch_has_its_token(case, dense):
    assert relative_error(case.logits, dense(case.name)[0]) > 1e-3  # something was merged
    for kept, out in zip((*KEPT, KEPT[1]), (*case.features.stages, case.features), strict=True):
        assert out.x.shape == (3, kept, 12) and out.x.dtype == jnp.float32
        assert (out.cls is None) == (case.name == "plain_mamba_l1")
        assert out.source.shape == (3, PATCHES) and out.source.dtype == jnp.int32
        np.testing.assert_array_equal(out.size, [np.bincount(row, minlength=kept) for row in np.asarray(out.source)])
        assert (np.diff(out.positions, axis=1) > 0).all()  # scan order
        # A token keeps its place, so it also stands for the patch there.
        own = np.take_along_axis(np.asarray(out.source), np.asarray(out.positions), axis=1)
        np.testing.assert_array_equal(own, np.tile(np.arange(kept), (3, 1)))


@jax.jit
def every_fill(features):
    return [to_grid(features, fill) for fill in ("zero", "nearest", "carry")]


def test_a_merged_token_stands_for_all_of_its_patches_on_the_grid(case):
    for out in (*case.features.stages, case.features):
        want = np.take_along_axis(out.x, out.source[:, :, None], axis=1)
        for shown in every_fill(out):  # there is nothing to fill
            np.testing.assert_array_equal(shown, want.reshape(3, *GRID, 12))


def test_what_leaves_the_first_block_are_means_of_what_leaves_it_unmerged(case, dense):
    """Holds for the hidden state and the residual. (In DeiT the MLP comes after the merge.)"""
    if case.name == "deit_tiny":
        return
    first, unmerged = case.features.stages[0], dense(case.name)[1].stages[0]
    members = np.asarray(first.source)[:, None, :] == np.arange(KEPT[0])[:, None]
    want = members @ np.asarray(unmerged.x) / members.sum(axis=2, keepdims=True)
    assert relative_error(first.x, want) < 1e-5
    if first.cls is not None:
        assert relative_error(first.cls, unmerged.cls) < 1e-6


def test_the_head_sees_every_patch_as_often(case):
    """PlainMamba averages over patches: a merged token is weighted by its number of patches."""
    features, head = case.features, case.model.head
    read = every_fill(features)[0].mean(axis=(1, 2)) if case.name == "plain_mamba_l1" else features.cls
    assert relative_error(case.logits, np.asarray(read) @ np.asarray(head.kernel) + np.asarray(head.bias)) < 1e-5


@pytest.mark.parametrize("name", ["vim_tiny", "deit_tiny", pytest.param("plain_mamba_l1", marks=pytest.mark.slow)])
def test_keeping_everything_is_the_dense_model(name, forward, images, dense):
    got = forward(make(name, pruning=merging(keep_ratio=1.0)), images)
    assert jax.tree.structure(got) == jax.tree.structure(dense(name))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(dense(name)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_images_do_not_influence_each_other(case):
    logits, features = case.others
    np.testing.assert_array_equal(logits[0], case.logits[0])
    np.testing.assert_array_equal(features.source[0], case.features.source[0])
    assert (features.source[1:] != case.features.source[1:]).any()


def test_one_compilation_for_many_batches(case):
    assert case.traces == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_alignments_differ(name, run_case):
    logits = [run_case(name, how).logits for how in ("none", "hold", "decay")]
    assert min(relative_error(logits[a], logits[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name, images):
    """Strict promotion shows that dtypes are never mixed by accident."""
    model = make(name, dtype=jnp.bfloat16, pruning=merging())
    out = jax.eval_shape(lambda: model.features(images))
    assert out.x.shape == (3, KEPT[1], 12) and out.x.dtype == jnp.float32


@pytest.mark.slow
def test_gradients_reach_every_weight(images, quick_jit):
    model = make("vim_tiny", depth=2, pruning=Merging(after_blocks=(1,), keep_ratio=0.6))
    gradient = quick_jit(jax.grad(lambda model, images: jnp.sum(jnp.square(model(images)))))(model, images)
    for path, leaf in nnx.to_flat_state(nnx.state(gradient, nnx.Param)):
        assert np.isfinite(leaf[...]).all() and np.asarray(leaf[...]).any(), path


def test_deit_attends_to_a_merged_token_as_to_its_patches(forward):
    """Merging pairs of equal patches changes nothing else (arXiv 2210.09461, section 3)."""
    sizes = dict(img_size=(8, 16))  # 2 x 4 patches
    half = np.random.default_rng(3).normal(size=(3, 8, 2, 1, 4, 3))
    images = jnp.asarray(np.broadcast_to(half, (3, 8, 2, 2, 4, 3)).reshape(3, 8, 16, 3), jnp.float32)
    models = [
        make("deit_tiny", **sizes, pruning=pruning) for pruning in (None, Merging(after_blocks=(1,), keep_ratio=0.5))
    ]
    for model in models:
        pairs = np.array(model.pos_embed[...])
        pairs[:, 2::2] = pairs[:, 1::2]
        model.pos_embed[...] = jnp.asarray(pairs)
    out = jax.tree.map(np.asarray, [forward(model, images) for model in models])
    (logits, unmerged), (merged_logits, merged) = out
    np.testing.assert_array_equal(merged.source, np.tile(np.arange(8) // 2, (3, 1)))
    assert relative_error(merged_logits, logits) < 1e-5
    assert relative_error(merged.x, unmerged.x[:, 1::2]) < 1e-5


def test_more_than_a_merge_can_do():
    with pytest.raises(InputError, match="keep_ratio=0.4 .* 6 of 15 .* 7"):
        make("vim_tiny", pruning=merging(keep_ratio=0.4))
