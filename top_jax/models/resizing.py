"""Resizes and pools maps as PyTorch does, by a constant matrix for each of the two axes.

Both operations are linear and separable, so one matrix product per axis computes them, forward and backward. XLA has
nothing faster on a CPU: `jax.image.resize` computes the same products, but with other weights (antialiasing).
"""

from __future__ import annotations

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.typing import Array, Float
from top_jax.values import one_of

Map = Float[Array, "B H W D"]
AnyMap = Float[Array, "_ _ _ _"]
"""A map `[B, H, W, D]`, of other sizes than the others of the call."""
Resized = Float[Array, "B rows columns D"]


def resize(x: Map, size: tuple[int, int], method: str = "bilinear") -> Resized:
    """Resizes a map; if it already has the size, it is returned unchanged.

    Args:
        x: `[B, H, W, D]`.
        size: the new (height, width).
        method: `bilinear` or `bicubic`.

    Returns:
        `[B, *size, D]`, in the dtype of x.

    Source: torch.nn.functional.interpolate with align_corners=False and antialias=False.
    """
    matrix = MATRICES[one_of("method", method, MATRICES)]
    return along_axes(x, *(matrix(old, new) for old, new in zip(x.shape[1:3], size, strict=True)))


def size_of(x: AnyMap) -> tuple[int, int]:
    """Returns the (height, width) of a map."""
    return x.shape[1], x.shape[2]


def adaptive_average_pool(x: Map, bins: int) -> Resized:
    """Averages a map `[B, H, W, D]` over `bins` x `bins` parts of nearly equal size, which may overlap.

    Source: torch.nn.functional.adaptive_avg_pool2d.
    """
    return along_axes(x, *(pooling_matrix(side, bins) for side in x.shape[1:3]))


def along_axes(x: Map, rows: np.ndarray, columns: np.ndarray) -> Resized:
    """Multiplies the rows of each map by one matrix `[new, H]`, and its columns by another `[new, W]`."""
    batch, height, width, channels = x.shape
    precision = jax.lax.Precision.HIGHEST  # by default a GPU rounds the factors of float32 products to ten bits
    if not _is_identity(rows):
        matrix = jnp.broadcast_to(jnp.asarray(rows, x.dtype)[None], (batch, *rows.shape))
        x = jnp.matmul(matrix, x.reshape(batch, height, width * channels), precision=precision)
        x = x.reshape(batch, rows.shape[0], width, channels)
    if not _is_identity(columns):
        matrix = jnp.broadcast_to(jnp.asarray(columns, x.dtype)[None, None], (*x.shape[:2], *columns.shape))
        x = jnp.matmul(matrix, x, precision=precision)
    return x


def _is_identity(matrix: np.ndarray) -> bool:
    return matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))


@functools.cache
def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """Returns the `[new_size, size]` interpolation matrix: half-pixel centres, two taps, edges repeated."""
    centre = np.maximum((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0)
    first = np.floor(centre).astype(int)
    weights = np.zeros((new_size, size))
    for tap, share in ((0, first + 1 - centre), (1, centre - first)):
        np.add.at(weights, (np.arange(new_size), np.minimum(first + tap, size - 1)), share)
    return weights


@functools.cache
def cubic_matrix(size: int, new_size: int, a: float = -0.75) -> np.ndarray:
    """Returns the `[new_size, size]` interpolation matrix: half-pixel centres, four taps, edges repeated."""
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((new_size, size))
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        index = np.clip(first + tap, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), index), np.where(distance <= 1, near, far))
    return weights


@functools.cache
def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """Returns the `[bins, size]` averaging matrix: bin i covers floor(i size / bins) to ceil((i + 1) size / bins)."""
    weights = np.zeros((bins, size))
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        weights[i, start:end] = 1 / (end - start)
    return weights


ROWS: Final = 16  # rows of a resized map that are computed at a time, if the whole would be too large
MATRICES: Final = {"bilinear": bilinear_matrix, "bicubic": cubic_matrix}

Index = np.ndarray | jax.Array
Share = np.ndarray | jax.Array


def combined(x: Map, index: Index, share: Share, *, axis: int) -> jax.Array:
    """Returns weighted sums of a map's rows (axis 1) or columns (axis 2): a product with a sparse matrix.

    Args:
        x: `[B, H, W, D]`.
        index: int `[new size, taps]`, the rows or columns that are summed.
        share: `[new size, taps]`, their weights; both from `taps_of`.
        axis: 1 or 2.
    """
    shape = [1, 1, 1]
    shape[axis - 1] = -1
    taps = (jnp.take(x, index[:, tap], axis=axis) * share[:, tap].reshape(shape) for tap in range(index.shape[1]))
    return functools.reduce(jnp.add, taps)


def taps_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nonzero entries of a matrix, by row: their columns, int32, and values, float32.

    Both are `[rows, taps]`; a row with fewer entries is padded with zeros.
    """
    taps = max(1, int((matrix != 0).sum(axis=1).max()))
    index = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
    return index.astype(np.int32), np.take_along_axis(matrix, index, axis=1).astype(np.float32)


def taps_by_rows(matrix: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns `taps_of` a matrix for `ROWS` of its rows at a time; the last step is padded with rows of zeros.

    Both are `[steps, ROWS, taps]`, with fewer rows in the only step of a smaller matrix.
    """
    rows = min(ROWS, len(matrix))
    places, shares = (np.pad(a, ((0, -len(a) % rows), (0, 0))) for a in taps_of(matrix))
    steps = (-1, rows, places.shape[1])
    return jnp.asarray(places.reshape(steps)), jnp.asarray(shares.reshape(steps))
