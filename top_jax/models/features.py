"""Features for dense tasks: the tokens that are left, their places in the image, and the map they form."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.pruning import Tokens
from top_jax.typing import Array, Float, Int
from top_jax.values import one_of, refused

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
        source: int32 `[B, M]` which of the K tokens stands for each patch of the image, -1 if none does.
        grid: rows and columns of patches in the image; M = rows x columns.
        size: float32 `[B, K]` number of patches that each token stands for; None if nothing was merged.
        stages: the features after each of the requested blocks.
    """

    x: Float[Array, "B K D"]
    positions: Int[Array, "B K"]
    cls: Float[Array, "B D"] | None
    source: Int[Array, "B M"]
    grid: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    size: Float[Array, "B K"] | None = None
    stages: tuple[Features, ...] = ()


def make_features(tokens: Tokens, grid: tuple[int, int]) -> Features:
    """Separates the patch tokens from the class token, which has a position of its own among the tokens."""
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
    """Returns the token at each place of the image, -1 for a place without one."""
    tokens = jnp.arange(positions.shape[1], dtype=jnp.int32)
    nowhere = jnp.full((num_patches,), -1, jnp.int32)
    places = jnp.where(positions < 0, num_patches, positions)  # outside of the image, so dropped
    return jax.vmap(lambda row: nowhere.at[row].set(tokens, mode="drop"))(places)


def to_grid(features: Features, fill: str = "zero") -> Float[Array, "B H W D"]:
    """Returns a feature map with every token back at its place in the image.

    Args:
        features: what `Backbone.features` returned, or one of its `stages`.
        fill: value of the places without a token. `zero`; `nearest`: the closest token on the grid, the first in
            raster order among equally close ones; `carry`: the last token before the place in raster order, as a
            `hold` scan would carry its state (places before the first token get the first one).

    Returns:
        float32 `[B, rows, columns, D]`. A merged token fills the places of all its patches.

    Raises:
        InputError: an unknown fill, or no `Features`.
    """
    if not isinstance(features, Features):
        raise refused("features", features, "what model.features(images) returns, or one of its stages")
    one_of("fill", fill, FILLS)
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
