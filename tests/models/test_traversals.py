"""The four paths through a grid, and through the tokens that pruning leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy

from top_jax.models import traversals as module
from top_jax.models.traversals import condensed_grid, from_cells, to_cells, walks

_compiled = jax.jit(module.traverse, static_argnums=(1, 2), static_argnames="by_token")
MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}  # (down, right) -> right, left, up, down


def whole(grid) -> np.ndarray:
    return np.arange(grid[0] * grid[1], dtype=np.int32)[None]


def traverse(*arguments, by_token):
    """Returns NumPy arrays, because indexing a JAX array compiles one more program."""
    return jax.tree.map(np.asarray, _compiled(*arguments, by_token=by_token))


def paths(traversals, image=0) -> np.ndarray:
    return traversals.order[:, image]


def test_a_small_grid_by_hand():
    traversals = traverse(whole((2, 3)), (2, 3), "hold", by_token=False)
    np.testing.assert_array_equal(
        paths(traversals), [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    )
    np.testing.assert_array_equal(
        traversals.moves[:, 0], [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]
    )
    assert traversals.cells is None and traversals.positions is None


def test_walks():
    assert walks((3, 3)).tolist() == [
        [0, 1, 2, 5, 4, 3, 6, 7, 8],
        [8, 7, 6, 3, 4, 5, 2, 1, 0],
        [0, 3, 6, 7, 4, 1, 2, 5, 8],
        [8, 5, 2, 1, 4, 7, 6, 3, 0],
    ]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 3), (4, 6), (5, 2), (14, 14)])
def test_every_step_is_to_a_neighbour(grid):
    traversals = traverse(whole(grid), grid, "decay", by_token=False)
    for g in range(4):
        order, moves = paths(traversals)[g], np.asarray(traversals.moves[g, 0])
        assert sorted(order) == list(range(grid[0] * grid[1]))
        rows, columns = np.divmod(order, grid[1])
        steps = list(zip(np.diff(rows), np.diff(columns), strict=True))
        assert [MOVES[step] for step in steps] == list(moves[1:]) and moves[0] == 0
        np.testing.assert_array_equal(traversals.positions[g, 0], np.arange(len(order)))
    np.testing.assert_array_equal(paths(traversals)[1], paths(traversals)[0][::-1])
    np.testing.assert_array_equal(paths(traversals)[3], paths(traversals)[2][::-1])


@pytest.mark.parametrize("alignment", ["hold", "decay"])
def test_what_is_left_keeps_its_order_and_its_steps(alignment):
    grid, rng = (4, 5), np.random.default_rng(0)
    positions = np.stack([np.sort(rng.choice(20, 9, replace=False)) for _ in range(3)]).astype(np.int32)
    full = traverse(whole(grid), grid, "decay", by_token=False)
    kept = traverse(jnp.asarray(positions), grid, alignment, by_token=False)
    by_token = traverse(jnp.asarray(positions), grid, alignment, by_token=True)
    for g in range(4):
        for image, places in enumerate(positions):
            steps = [step for step, cell in enumerate(paths(full)[g]) if cell in places]
            np.testing.assert_array_equal(places[paths(kept, image)[g]], paths(full)[g][steps])
            np.testing.assert_array_equal(kept.moves[g, image], np.asarray(full.moves[g, 0])[steps])
            order = paths(by_token, image)[g]
            np.testing.assert_array_equal(np.asarray(by_token.moves[g, image])[order], kept.moves[g, image])
            if alignment == "decay":
                np.testing.assert_array_equal(kept.positions[g, image], steps)
    assert kept.grid == grid and (kept.positions is None) == (alignment == "hold")


@pytest.mark.parametrize(
    ("length", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (2, 3)), (9, (3, 3)), (10, (3, 4)), (138, (12, 12))]
)
def test_condensed_grid(length, grid):
    assert condensed_grid(length) == grid
    assert (grid[0] - 1) * grid[1] < length <= grid[0] * grid[1]


def test_none_walks_the_condensed_grid_and_skips_its_empty_cells():
    positions = jnp.asarray(
        [[7, 0, 19, 3, 11], [1, 2, 3, 4, 5]], jnp.int32
    )  # in score order: their values do not matter
    traversals = traverse(positions, (4, 5), "none", by_token=False)
    assert traversals.grid == (2, 3) and traversals.cells is None and traversals.positions is None
    for image in range(2):
        np.testing.assert_array_equal(
            paths(traversals, image), [[0, 1, 2, 4, 3], [3, 4, 2, 1, 0], [0, 3, 4, 1, 2], [2, 1, 4, 3, 0]]
        )
    np.testing.assert_array_equal(
        traversals.moves[:, 0], [[0, 1, 1, 2, 2], [0, 1, 3, 2, 2], [0, 4, 1, 3, 1], [3, 2, 4, 2, 3]]
    )


def test_none_of_a_whole_image_walks_the_image():
    positions = jnp.asarray([[2, 0, 1, 5, 4, 3]], jnp.int32)
    assert traverse(positions, (2, 3), "none", by_token=False).grid == (2, 3)


@pytest.mark.parametrize("alignment", ["none", "hold"])
def test_to_cells_and_back(alignment):
    rng = np.random.default_rng(0)
    positions = np.stack([np.sort(rng.choice(12, 5, replace=False)) for _ in range(2)]).astype(np.int32)
    traversals = traverse(jnp.asarray(positions), (3, 4), alignment, by_token=False)
    x = rng.normal(size=(2, 5, 2)).astype(np.float32)

    @in_numpy
    def there_and_back(x, traversals):
        grid = to_cells(x, traversals)
        return grid, from_cells(grid, traversals)

    grid, back = there_and_back(x, traversals)
    assert grid.shape == ((2, 3, 4, 2) if alignment == "hold" else (2, 2, 3, 2))
    np.testing.assert_array_equal(back, x)
    cells = grid.reshape(2, -1, 2)
    places = positions if alignment == "hold" else np.tile(np.arange(5), (2, 1))
    for image in range(2):
        np.testing.assert_array_equal(cells[image][places[image]], x[image])
        assert not np.delete(cells[image], places[image], axis=0).any()
