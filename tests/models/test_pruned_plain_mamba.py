"""PlainMamba with token pruning, against the definition (docs/concepts/models.md, section 2) written out in NumPy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy, relative_error
from flax import nnx
from small_models import random_model

from top_jax.pruning import Pruning

SIZES = dict(img_size=(12, 20), patch_size=4, embed_dim=8, depth=3, d_state=3, num_classes=5, layers_with_dwconv=(1,))
GRID = (3, 5)
ALIGNMENTS = ("none", "hold", "decay")


def make(**overrides):
    """Builds a small PlainMamba with random weights."""
    return random_model("plain_mamba_l1", scale=0.5, **{**SIZES, **overrides})


@pytest.fixture(scope="module")
def images():
    return jax.device_put(np.random.default_rng(1).normal(size=(3, 12, 20, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def forward(quick_jit):
    def run(model, images):
        features = model.features(images)
        return model.classify(features), features

    return quick_jit(run)


@pytest.fixture(scope="module")
def dense(forward, images):
    return forward(make(), images)


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


def walks(grid):
    """Walks each traversal and returns [(row, column, move)]; moves: 0 start, 1 right, 2 left, 3 up, 4 down."""
    rows, columns = grid
    by_rows = [(i, j if i % 2 == 0 else columns - 1 - j) for i in range(rows) for j in range(columns)]
    by_columns = [(i if j % 2 == 0 else rows - 1 - i, j) for j in range(columns) for i in range(rows)]
    for walk in (by_rows, by_rows[::-1], by_columns, by_columns[::-1]):
        moves = [0]
        for (i, j), (k, m) in zip(walk, walk[1:], strict=False):
            moves.append({(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}[k - i, m - j])
        yield [(i, j, move) for (i, j), move in zip(walk, moves, strict=True)]


def mixer_by_hand(mixer, x, cells, grid, alignment, reorder):
    """Mixes one image's normed tokens x [K, D] in `cells` of `grid`; returns the mixer's output and gated sum y."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    inner = p["D"].shape[0]
    projected = x @ p["in_proj/kernel"] + p["in_proj/bias"]
    u, z = projected[:, :inner], projected[:, inner:]

    image = np.zeros((grid[0] + 6, grid[1] + 6, inner))  # zeros in empty cells and around the grid
    for token, cell in enumerate(cells):
        image[3 + cell // grid[1], 3 + cell % grid[1]] = u[token]
    taps = p["conv_kernel"]
    u = np.stack(
        [np.sum(image[c // grid[1] :, c % grid[1] :][:7, :7] * taps, axis=(0, 1)) + p["conv_bias"] for c in cells]
    )
    u = silu(u)
    rank, states = p["dt_proj/kernel"].shape[0], p["A_log"].shape[1]
    dt, B, C = np.split(u @ p["x_proj/kernel"], [rank, rank + states], axis=1)
    delta = softplus(dt @ p["dt_proj/kernel"] + 2 * p["dt_proj/bias"])  # the bias is added twice
    A = -np.exp(p["A_log"])

    total = np.zeros_like(u)
    token_at = {int(cell): token for token, cell in enumerate(cells)}
    for walk in walks(grid):
        h, step, before, gap = np.zeros((inner, states)), 0, np.zeros(inner), 0
        for i, j, move in walk:
            token = token_at.get(i * grid[1] + j)
            if token is None:
                gap += step > 0
                continue
            row = token if reorder else step  # delta, B and C come from this row
            b = B[row] + p["direction_Bs"][move]
            extra = gap * before if alignment == "decay" else 0
            h = np.exp((delta[row] + extra)[:, None] * A) * h + (delta[row] * u[token])[:, None] * b
            total[token] += h @ C[row] + p["D"] * u[token]
            step, before, gap = step + 1, delta[row], 0
    y = total * silu(z)
    return y @ p["out_proj/kernel"] + p["out_proj/bias"], y


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_pruned_layer_by_hand(alignment, reorder, quick_jit):
    rng = np.random.default_rng(2)
    model = make(reorder_parameters=reorder, depth=1, layers_with_dwconv=(), pruning=Pruning(alignment=alignment))
    mixer = model.blocks[0].mixer
    positions = np.stack([np.sort(rng.choice(15, 7, replace=False)) for _ in range(2)]).astype(np.int32)
    x = rng.normal(size=(2, 7, 8)).astype(np.float32)

    def mix(model, x, positions):
        tokens = model.embed(jnp.zeros((2, 12, 20, 3))).keep(positions, condensed=alignment == "none")
        return model.blocks[0].mixer(x, model.paths(tokens))

    out, evidence = jax.tree.map(np.asarray, quick_jit(mix)(model, jnp.asarray(x), jnp.asarray(positions)))
    for image in range(2):
        cells, grid = (np.arange(7), (3, 3)) if alignment == "none" else (positions[image], GRID)
        want, y = mixer_by_hand(mixer, x[image].astype(np.float64), cells, grid, alignment, reorder)
        assert relative_error(out[image], want) < 1e-5
        assert relative_error(evidence["clip"][image], np.maximum(y, 0).mean(-1)) < 1e-5


@pytest.mark.parametrize(
    "alignment", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "hold")), "decay"]
)
def test_keeping_everything_is_the_dense_model(alignment, forward, images, dense):
    model = make(pruning=Pruning(after_blocks=(1, 2), keep_ratio=1.0, alignment=alignment))
    logits, features = forward(model, images)
    assert relative_error(logits, dense[0]) < 1e-6
    assert relative_error(features.x, dense[1].x) < 1e-6
    np.testing.assert_array_equal(features.positions, dense[1].positions)


@pytest.mark.parametrize(
    "alignment", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "hold")), "decay"]
)
def test_pruned_model(alignment, forward, images, dense):
    pruning = Pruning(after_blocks=(1, 2), keep_ratio=(0.6, 0.5), alignment=alignment)
    logits, features = forward(make(pruning=pruning), images)
    assert features.x.shape == (3, 5, 8) and features.cls is None
    assert relative_error(logits, dense[0]) > 1e-3  # something was pruned
    assert (np.diff(features.positions, axis=1) > 0).all()
    other_images = np.array(images)
    other_images[1:] = 1 - 3 * other_images[1:]
    other_logits, other = jax.tree.map(np.asarray, forward(make(pruning=pruning), jnp.asarray(other_images)))
    np.testing.assert_array_equal(other_logits[0], np.asarray(logits)[0])
    assert (other.positions[1:] != np.asarray(features.positions)[1:]).any()


@pytest.mark.slow
def test_alignments_and_orders_differ(forward, images):
    settings = [dict(alignment=alignment) for alignment in ALIGNMENTS] + [dict(alignment="none", order="score")]
    logits = [
        forward(make(pruning=Pruning(after_blocks=(1, 2), keep_ratio=0.6, **chosen)), images)[0] for chosen in settings
    ]
    for i, first in enumerate(logits):
        assert all(relative_error(first, second) > 1e-4 for second in logits[i + 1 :])


@pytest.mark.slow
def test_gradients_are_finite(images):
    model = make(pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="decay"), depth=2)
    grads = jax.jit(jax.grad(lambda model, images: jnp.sum(model(images) ** 2), argnums=(0, 1)))(model, images)
    leaves = jax.tree.leaves((nnx.state(grads[0], nnx.Param), grads[1]))
    assert all(np.isfinite(leaf).all() for leaf in leaves) and sum(bool((leaf != 0).any()) for leaf in leaves) > 20


def test_dwconv_sees_zeros_where_tokens_are_gone(images):
    """The convolution at a layer's end acts on the grid, its norm on the remaining tokens."""
    model = make(depth=2, pruning=Pruning(after_blocks=(1,), keep_ratio=0.4))
    tail = model.blocks[1].tail
    positions = np.asarray([[1, 2, 6, 9, 13, 14]], np.int32)
    x = np.random.default_rng(3).normal(size=(1, 6, 8))

    @in_numpy
    def convolved(model, image, positions, x):
        tokens = model.embed(image).keep(positions, condensed=False)
        return model.blocks[1].tail(x, model.paths(tokens))

    got = convolved(model, np.asarray(images)[:1], positions, x.astype(np.float32))
    kernel, norm = np.asarray(tail.kernel[...], np.float64), nnx.to_pure_dict(nnx.state(tail.norm))
    norm = SimpleNamespace(**{name: np.asarray(value) for name, value in norm.items()})
    image = np.zeros((5, 7, 8))
    for token, place in enumerate(positions[0]):
        image[1 + place // 5, 1 + place % 5] = x[0, token]
    for token, place in enumerate(positions[0]):
        y = np.sum(image[place // 5 :, place % 5 :][:3, :3] * kernel, axis=(0, 1))
        y = (y - norm.mean) / np.sqrt(norm.var + 1e-5) * norm.scale + norm.bias
        gelu = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(y)]
        np.testing.assert_allclose(got[0, token], gelu, atol=1e-5)
