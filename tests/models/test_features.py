"""Feature maps for dense tasks, and the tokens after intermediate blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy

from top_jax.errors import InputError
from top_jax.models import to_grid
from top_jax.models.features import make_features
from top_jax.pruning import Pruning, Tokens

GRID = (2, 3)


def tokens(positions, source=None):
    """Token i of image b has the value 10 b + i + 1."""
    positions = np.asarray(positions, np.int32)
    batch, kept = positions.shape
    x = (10 * np.arange(batch)[:, None] + np.arange(kept) + 1).astype(np.float32)
    source = None if source is None else np.asarray(source, np.int32)
    return Tokens(x[:, :, None], None, positions, None, source=source)


@in_numpy
def features(tokens):
    return make_features(tokens, GRID)


@in_numpy
def filled(tokens):
    """The map of each fill."""
    return {fill: to_grid(make_features(tokens, GRID), fill) for fill in FILLED}


POSITIONS = [[1, 5], [3, 4]]
FILLED = {
    "zero": [[[0, 1, 0], [0, 0, 2]], [[0, 0, 0], [11, 12, 0]]],
    "nearest": [[[1, 1, 1], [1, 1, 2]], [[11, 12, 12], [11, 12, 12]]],  # the first of equally close ones
    "carry": [[[1, 1, 1], [1, 1, 2]], [[11, 11, 11], [11, 12, 12]]],
}


@pytest.mark.parametrize("fill", FILLED)
def test_fills(fill):
    grid = filled(tokens(POSITIONS))[fill]
    np.testing.assert_array_equal(grid[..., 0], FILLED[fill])


@pytest.mark.parametrize("fill", FILLED)
def test_nothing_missing_nothing_filled(fill):
    grid = filled(tokens([[0, 1, 2, 3, 4, 5]]))[fill]
    np.testing.assert_array_equal(grid[..., 0], [[[1, 2, 3], [4, 5, 6]]])


@pytest.mark.parametrize("fill", FILLED)
def test_a_merged_token_stands_for_its_patches(fill):
    grid = filled(tokens([[1, 5]], source=[[0, 0, 1, 0, 1, 1]]))[fill]
    np.testing.assert_array_equal(grid[..., 0], [[[1, 1, 2], [1, 2, 2]]])


def test_any_order_and_tokens_without_a_place():
    out = tokens([[4, -1, 0]])
    np.testing.assert_array_equal(features(out).source, [[2, -1, -1, -1, 0, -1]])
    np.testing.assert_array_equal(filled(out)["zero"][..., 0], [[[3, 0, 0], [0, 1, 0]]])


def test_unknown_fill():
    with pytest.raises(InputError, match="fill='mean'"):
        to_grid(features(tokens(POSITIONS)), "mean")


def test_gradient_goes_back_to_the_tokens():
    out = jax.tree.map(jnp.asarray, features(tokens(POSITIONS)))

    @in_numpy
    def gradients(x):
        total = lambda x, fill: jnp.sum(to_grid(dataclasses.replace(out, x=x), fill))  # noqa: E731
        return {fill: jax.grad(total)(x, fill) for fill in FILLED}

    for fill, grad in gradients(out.x).items():
        np.testing.assert_array_equal(grad.sum(axis=(1, 2)), [2, 2] if fill == "zero" else [6, 6])


@pytest.mark.parametrize("alignment", ["none", "hold"])
def test_stages(alignment, make_model, images, quick_jit):
    model = make_model(pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, alignment=alignment))

    def run(model, images):
        wanted = model.features(images, stages=(1, 3))
        return wanted, model.features(images), model.norm(wanted.stages[1].x)

    wanted, plain, normed = quick_jit(run)(model, images)
    assert plain.stages == () and wanted.grid == (4, 4)
    np.testing.assert_array_equal(wanted.x, plain.x)
    first, last = wanted.stages
    assert first.x.shape == last.x.shape == (3, 8, 16)
    np.testing.assert_array_equal(first.positions, last.positions)
    np.testing.assert_array_equal(last.positions, wanted.positions)
    np.testing.assert_allclose(normed, wanted.x, atol=1e-5)  # the final features are the last stage after the norm
    assert jax.eval_shape(to_grid, first).shape == (3, 4, 4, 16)


@pytest.mark.parametrize("stages", [(0,), (2, 4)])
def test_a_stage_that_is_not_there(stages, make_model, images):
    with pytest.raises(InputError, match="stages="):
        make_model().features(images, stages=stages)
