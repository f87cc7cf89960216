"""What a backbone hands to a dense task: the tokens that are left, where they were, and the grid they fill."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError
from top_jax.pruning import Tokens
from top_jax.typing import Array, Float, Int

FILLS = ("zero", "nearest", "carry")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Tokens of a batch, after the final norm or after a block.

    Attributes:
        x: float32 `[B, K, D]` patch tokens.
        positions: int32 `[B, K]` each token's place in raster order, 0..M-1; -1 for a token that stands for no place
            (EViT's fused token).
        cls: float32 `[B, D]` the class token, or None for a model without one.
        source: int32 `[B, M]` which of the K tokens stands for each patch of the image, -1 where none does.
        grid: rows and columns of patches of the image; M = rows x columns.
        size: float32 `[B, K]` patches that each token stands for; None where nothing is merged.
        stages: the same after each of the blocks that were asked for.
    """

    x: Float[Array, "B K D"]
    positions: Int[Array, "B K"]
    cls: Float[Array, "B D"] | None
    source: Int[Array, "B M"]
    grid: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    size: Float[Array, "B K"] | None = None
    stages: tuple[Features, ...] = ()


def make_features(tokens: Tokens, grid: tuple[int, int]) -> Features:
    """Parts patch tokens from the class token, which owns a place of its own among the tokens' positions."""
    x, positions, size, cls = tokens.x, tokens.positions, tokens.size, None
    num_patches = grid[0] * grid[1]
    if tokens.cls_index is not None:
        slots = tokens.patch_slots()
        own = jnp.take_along_axis(positions, tokens.cls_index[:, None], axis=1)
        positions = jnp.take_along_axis(positions, slots, axis=1)
        positions = positions - (positions > own).astype(positions.dtype)
        cls = jnp.take_along_axis(x, tokens.cls_index[:, None, None], axis=1)[:, 0]
        x = jnp.take_along_axis(x, slots[:, :, None], axis=1)
        size = None if size is None else jnp.take_along_axis(size, slots, axis=1)
    source = _sources(positions, num_patches) if tokens.source is None else tokens.source
    return Features(x, positions, cls, source, grid, size)


def _sources(positions: Int[Array, "B K"], num_patches: int) -> Int[Array, "B M"]:
    """The token at each place, -1 where there is none."""
    tokens = jnp.arange(positions.shape[1], dtype=jnp.int32)
    nowhere = jnp.full((num_patches,), -1, jnp.int32)
    places = jnp.where(positions < 0, num_patches, positions)  # out of the image, so dropped
    return jax.vmap(lambda row: nowhere.at[row].set(tokens, mode="drop"))(places)


def to_grid(features: Features, fill: str = "zero") -> Float[Array, "B H W D"]:
    """The feature map of a dense task: every token back where it was.

    Args:
        features: of a model, or one of its `stages`.
        fill: what stands where no token is left: `zero`; `nearest`, the token closest on the grid (of equally close
            ones the first in raster order); `carry`, the one before it in raster order (the first token before the
            first), as a `hold` scan would carry its state.

    Returns:
        float32 `[B, rows, columns, D]`. A merged token stands for all of its patches.

    Raises:
        InputError: an unknown fill.
    """
    if fill not in FILLS:
        raise InputError(f"fill={fill!r} is unknown; choose one of {', '.join(FILLS)}.")
    source = features.source
    if fill == "nearest":
        source = jax.vmap(functools.partial(_nearest, grid=features.grid))(source)
    if fill == "carry":
        source = _carried(source)
    x = jnp.take_along_axis(features.x, jnp.maximum(source, 0)[:, :, None], axis=1)
    x = jnp.where(source[:, :, None] < 0, jnp.zeros_like(x), x)
    return x.reshape(x.shape[0], *features.grid, x.shape[2])


def _nearest(source: Int[Array, " M"], grid: tuple[int, int]) -> Int[Array, " M"]:
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    far = np.iinfo(np.int32).max
    closest = jnp.argmin(jnp.where(source[None, :] < 0, far, jnp.asarray(squared, jnp.int32)), axis=1)
    return source[closest]


def _carried(source: Int[Array, "B M"]) -> Int[Array, "B M"]:
    place = jnp.arange(source.shape[1], dtype=jnp.int32)[None, :]
    last = jax.lax.cummax(jnp.where(source < 0, -1, place), axis=1)
    first = jnp.argmax(source >= 0, axis=1).astype(jnp.int32)[:, None]
    return jnp.take_along_axis(source, jnp.where(last < 0, first, last), axis=1)
