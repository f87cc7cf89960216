"""The four paths of PlainMamba's scans through the grid, whole or pruned.

    1  rows from the top, boustrophedon       2  the reverse of 1
    3  columns from the left, boustrophedon   4  the reverse of 3

Source: ChenhongyiYang/PlainMamba, plain_mamba_layer.py, `get_permute_order`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.typing import Array, Float, Int, Positions

DIRECTIONS = 4
START, RIGHT, LEFT, UP, DOWN = range(5)  # rows of direction_Bs: the move that reached a token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traversals:
    """The four permutations of one stage, computed once per stage and used by all of its blocks.

    Attributes:
        order: int32 `[4, B, L]` the token that each step of each traversal visits.
        moves: int32 `[4, B, L]` the move with which the traversal of the whole grid reaches the token that each step
            visits (or, with `by_token`, each token).
        positions: int32 `[4, B, L]` index of each step in the traversal of the whole grid, for `decay`; else None.
        cells: int32 `[B, L]` cell of each token on the grid, in raster order; None if token i is in cell i.
        grid: rows and columns.
    """

    order: Int[Array, "4 B L"]
    moves: Int[Array, "4 B L"]
    positions: Int[Array, "4 B L"] | None
    cells: Positions | None
    grid: tuple[int, int] = dataclasses.field(metadata=dict(static=True))


def traverse(positions: Positions, image_grid: tuple[int, int], alignment: str, *, by_token: bool) -> Traversals:
    """Returns the traversals of the tokens at `positions`.

    Args:
        positions: int32 `[B, L]` raster indices; increasing unless `alignment` is `none`.
        image_grid: rows and columns of the image.
        alignment: `hold` and `decay` walk the image's grid and skip pruned cells; `none` walks the condensed grid.
        by_token: whether to list the moves by token instead of by step.
    """
    batch, length = positions.shape
    whole = length == image_grid[0] * image_grid[1]
    if whole or alignment == "none":
        grid = image_grid if whole else condensed_grid(length)
        cells = np.arange(length, dtype=np.int32)[None, :]  # one row for the whole batch
    else:
        grid, cells = image_grid, positions
    step_of_cell, move_of_cell = (jnp.asarray(table) for table in _tables(grid))
    steps = step_of_cell[:, cells]  # [4, B or 1, L]
    order = jnp.argsort(steps, axis=-1).astype(jnp.int32)
    moves = move_of_cell[:, cells]
    if not by_token:
        moves = jnp.take_along_axis(moves, order, axis=-1)
    shape = (DIRECTIONS, batch, length)
    return Traversals(
        order=jnp.broadcast_to(order, shape),
        moves=jnp.broadcast_to(moves, shape),
        positions=jnp.broadcast_to(jnp.sort(steps, axis=-1), shape) if alignment == "decay" else None,
        cells=None if whole or alignment == "none" else positions,
        grid=grid,
    )


def condensed_grid(length: int) -> tuple[int, int]:
    """Returns rows and columns of the grid into which `none` packs `length` tokens, ceil(sqrt(length)) wide."""
    width = math.isqrt(length - 1) + 1
    return -(-length // width), width


def to_cells(x: Float[Array, "B L E"], traversals: Traversals) -> Float[Array, "B H W E"]:
    """Scatters tokens `[B, L, E]` to their grid, with zeros in empty cells."""
    batch, length, width = x.shape
    size = math.prod(traversals.grid)
    if traversals.cells is None:
        x = jnp.pad(x, ((0, 0), (0, size - length), (0, 0)))
    else:
        empty = jnp.zeros((size, width), x.dtype)
        scatter = lambda row, cells: empty.at[cells].set(row, unique_indices=True, indices_are_sorted=True)  # noqa: E731
        x = jax.vmap(scatter)(x, traversals.cells)
    return x.reshape(batch, *traversals.grid, width)


def from_cells(grid: Float[Array, "B H W E"], traversals: Traversals) -> Float[Array, "B L E"]:
    """Gathers the tokens `[B, L, E]` from their grid; the inverse of `to_cells`."""
    x = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    if traversals.cells is None:
        return x[:, : traversals.order.shape[-1]]
    return jnp.take_along_axis(x, traversals.cells[:, :, None], axis=1)


def walks(grid: tuple[int, int]) -> np.ndarray:
    """Returns the cell (in raster order) that each step of each traversal of a whole grid visits, int `[4, H W]`."""
    cells = np.arange(grid[0] * grid[1]).reshape(grid)
    rows, columns = _snake(cells), _snake(cells.T)
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


@functools.cache
def _tables(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each traversal and cell, int32 `[4, H W]`: the step that visits it, and the move that reaches it."""
    orders = walks(grid)
    moves = np.empty(orders.shape, np.int32)
    for g, order in enumerate(orders):
        moves[g, order] = _moves(order, grid[1])
    return np.argsort(orders, axis=1).astype(np.int32), moves


def _snake(places: np.ndarray) -> np.ndarray:
    """Returns the cells row by row, every other row from right to left."""
    return np.concatenate([row[::-1] if i % 2 else row for i, row in enumerate(places)])


def _moves(order: np.ndarray, width: int) -> np.ndarray:
    row, column = np.divmod(order, width)
    down, right = np.diff(row), np.diff(column)
    moves = np.select([right > 0, right < 0, down < 0, down > 0], [RIGHT, LEFT, UP, DOWN])
    return np.concatenate([[START], moves])
