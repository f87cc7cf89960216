"""MTR's score: the mean over channels of the time step after softplus, summed over the scans (arXiv 2507.14042).

Computed once more in NumPy from the weights: for ViM on the sequence and on its reverse, for PlainMamba by walking the
grid step by step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_model

from top_jax.models.traversals import traverse
from top_jax.pruning import Pruning

BATCH, ROWS, COLUMNS = 2, 3, 4
SIZES = dict(img_size=(8 * ROWS, 8 * COLUMNS), patch_size=8, embed_dim=20, depth=2, d_state=3, num_classes=5)


# Compiles fast, and drops the scan, which this evidence does not need.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
delta_evidence = quick_jit(lambda mixer, x: mixer(x, None)[1]["delta"])


def make(name: str, **overrides: Any):
    """Builds a small model with random weights."""
    return random_model(name, scale=0.4, **{**SIZES, **overrides})


def array(param: Any) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def vim_delta(mixer: Any, x: np.ndarray) -> np.ndarray:
    """Computes the score `[L]` of one image's normed tokens `[L, D]`."""
    total = np.zeros(len(x))
    for direction, step in ((mixer.forward, 1), (mixer.backward, -1)):
        kernel = array(direction.conv_kernel)
        u = (x @ array(mixer.in_proj.kernel))[::step, : kernel.shape[1]]
        past = np.concatenate([np.zeros((len(kernel) - 1, u.shape[1])), u])
        u = silu(
            np.stack([np.sum(kernel * past[i : i + len(kernel)], 0) for i in range(len(u))])
            + array(direction.conv_bias)
        )
        dt = (u @ array(direction.x_proj.kernel))[:, : direction.dt_proj.kernel.shape[0]]
        delta = softplus(dt @ array(direction.dt_proj.kernel) + array(direction.dt_bias))
        total += delta.mean(axis=1)[::step]
    return total


def plain_mamba_delta(mixer: Any, x: np.ndarray, places: list[int], *, reorder: bool) -> np.ndarray:
    """Computes the score `[K]` of one image's normed tokens `[K, D]` at raster `places`."""
    inner = mixer.conv_bias.shape[0]
    grid = {
        divmod(place, COLUMNS): (row @ array(mixer.in_proj.kernel) + array(mixer.in_proj.bias))[:inner]
        for place, row in zip(places, x, strict=True)
    }
    kernel = array(mixer.conv_kernel)
    reach = len(kernel) // 2
    u = np.stack(
        [
            sum(
                kernel[r - row + reach, c - column + reach] * value
                for (r, c), value in grid.items()
                if abs(r - row) <= reach and abs(c - column) <= reach
            )
            for row, column in grid
        ]
    )
    u = silu(u + array(mixer.conv_bias))
    dt = (u @ array(mixer.x_proj.kernel))[:, : mixer.dt_proj.kernel.shape[0]]
    twice = 2 * array(mixer.dt_proj.bias)  # once in the projection, once more before softplus
    mean = softplus(dt @ array(mixer.dt_proj.kernel) + twice).mean(axis=1)
    by_rows = [(r, c) for r in range(ROWS) for c in (range(COLUMNS) if r % 2 == 0 else reversed(range(COLUMNS)))]
    by_columns = [(r, c) for c in range(COLUMNS) for r in (range(ROWS) if c % 2 == 0 else reversed(range(ROWS)))]
    total = np.zeros(len(places))
    for walk in (by_rows, by_rows[::-1], by_columns, by_columns[::-1]):
        visited = [places.index(r * COLUMNS + c) for r, c in walk if r * COLUMNS + c in places]
        for step, token in enumerate(visited):
            total[token] += mean[token if reorder else step]
    return total


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, count, SIZES["embed_dim"])).astype(np.float32)


def test_vim():
    mixer = make("vim_tiny").blocks[0].mixer
    x = tokens(ROWS * COLUMNS + 1)
    got = delta_evidence(mixer, jnp.asarray(x))
    want = np.stack([vim_delta(mixer, row) for row in x])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    one_way = np.stack([vim_delta(mixer, row[::-1])[::-1] for row in x])
    assert np.abs(one_way / want - 1).max() > 0.01  # direction matters


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("places", [list(range(ROWS * COLUMNS)), [0, 1, 4, 6, 7, 9, 11]])
def test_plain_mamba(places, reorder):
    """Checks the whole grid and a pruned one."""
    mixer = make("plain_mamba_l1", reorder_parameters=reorder).blocks[0].mixer
    x = tokens(len(places))
    positions = np.tile(np.asarray(places, np.int32)[None], (BATCH, 1))

    @quick_jit
    def evidence(mixer, x, positions):
        return mixer(x, traverse(positions, (ROWS, COLUMNS), "hold", by_token=reorder))[1]["delta"]

    got = evidence(mixer, jnp.asarray(x), jnp.asarray(positions))
    want, other = (
        np.stack([plain_mamba_delta(mixer, row, places, reorder=how) for row in x]) for how in (reorder, not reorder)
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(other / want - 1).max() > 0.01  # the two forms differ


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
def test_pruning_keeps_the_tokens_with_the_largest_time_steps(name):
    model = make(name, pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, score="delta"))
    images = jax.device_put(np.random.default_rng(2).normal(size=(BATCH, *SIZES["img_size"], 3)).astype(np.float32))
    block = model.blocks[0]
    normed, features = quick_jit(
        lambda model, images: (model.blocks[0].norm(model.embed(images).x), model.features(images))
    )(model, images)
    normed = np.asarray(normed)
    if name == "vim_tiny":
        scores = [np.delete(vim_delta(block.mixer, row), ROWS * COLUMNS // 2) for row in normed]
    else:
        scores = [plain_mamba_delta(block.mixer, row, list(range(ROWS * COLUMNS)), reorder=False) for row in normed]
    want = [np.sort(np.argsort(-row)[: ROWS * COLUMNS // 2]) for row in scores]
    np.testing.assert_array_equal(features.positions, want)
    assert not np.array_equal(want[0], want[1])
