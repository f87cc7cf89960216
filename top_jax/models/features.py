"""Features for dense tasks: the tokens that are left, their positions in the image, and the map they form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError
from top_jax.pruning import Tokens
from top_jax.typing import Array, Float, Int
from top_jax.values import one_of, refused

FILLS: Final = ("frozen", "nearest", "carry", "zero")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Tokens of a batch, after the final norm or after a block.

    Attributes:
        x: float32 `[B, K, D]` patch tokens.
        positions: int32 `[B, K]` each token's patch in raster order, 0..M-1; -1 for a token without a patch of its own
            (EViT's fused token).
        cls: float32 `[B, D]` the class token, or None for a model without one.
        source: int32 `[B, M]` which of the K tokens stands for each patch of the image, -1 if none does.
        grid: rows and columns of patches in the image; M = rows x columns.
        size: float32 `[B, K]` number of patches that each token stands for; None if nothing was merged.
        canvas: float32 `[B, M, D]` each patch as it was before the latest reduction; a token that was dropped earlier
            is there as it left its last block. None before any reduction.
        whole: whether token i is patch i, because no reduction has happened.
        stages: the features after each of the requested blocks.
    """

    x: Float[Array, "B K D"]
    positions: Int[Array, "B K"]
    cls: Float[Array, "B D"] | None
    source: Int[Array, "B M"]
    grid: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    size: Float[Array, "B K"] | None = None
    canvas: Float[Array, "B M D"] | None = None
    whole: bool = dataclasses.field(default=False, metadata=dict(static=True))
    stages: tuple[Features, ...] = ()


def make_features(
    tokens: Tokens, grid: tuple[int, int], canvas: Float[Array, "B M D"] | None = None, *, whole: bool = False
) -> Features:
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
    return Features(x, positions, cls, source, grid, size, canvas, whole)


def _sources(positions: Int[Array, "B K"], num_patches: int) -> Int[Array, "B M"]:
    """Returns the token of each patch of the image, -1 for a patch without one."""
    tokens = jnp.arange(positions.shape[1], dtype=jnp.int32)
    nowhere = jnp.full((num_patches,), -1, jnp.int32)
    places = jnp.where(positions < 0, num_patches, positions)  # outside of the image, so dropped
    return jax.vmap(lambda row: nowhere.at[row].set(tokens, mode="drop"))(places)


def painted(features: Features) -> Float[Array, "B M D"]:
    """Returns the value of every patch: its token's, or else the canvas's, as the fill `frozen` needs it.

    The tokens are gathered: a scatter into the canvas gives the same result, but is slower on a CPU.

    Raises:
        InputError: tokens are missing, and there is no canvas.
    """
    if features.whole:
        return features.x
    x = jnp.take_along_axis(features.x, jnp.maximum(features.source, 0)[:, :, None], axis=1)
    if features.canvas is None:
        if features.size is None and features.x.shape[1] < features.source.shape[1]:
            raise InputError(
                "fill='frozen' needs a canvas with the dropped tokens, and these features have none; pass what "
                "model.features(images) returns, or choose another fill."
            )
        return jnp.where(features.source[:, :, None] < 0, jnp.zeros_like(x), x)
    return jnp.where(features.source[:, :, None] < 0, features.canvas, x)


def to_grid(features: Features, fill: str = "frozen") -> Float[Array, "B H W D"]:
    """Returns a feature map with every token at its patch of the image.

    Args:
        features: what `Backbone.features` returned, or one of its `stages`.
        fill: value of the patches whose token was dropped. `frozen`: that token as it left its last block. `nearest`:
            the closest token on the grid, the first in raster order among equally close ones. `carry`: the last token
            before the patch in raster order, as a `hold` scan carries its state (patches before the first token get
            that one). `zero`: zeros.

    Returns:
        float32 `[B, rows, columns, D]`. A merged token fills all its patches.

    Raises:
        InputError: an unknown fill, no `Features`, or `frozen` for features that lost tokens and have no `canvas`.
    """
    if not isinstance(features, Features):
        raise refused("features", features, "what model.features(images) returns, or one of its stages")
    one_of("fill", fill, FILLS)
    if fill == "frozen" or features.whole:
        return _as_map(painted(features), features.grid)
    source = features.source
    if fill == "nearest":
        source = jax.vmap(functools.partial(_nearest, grid=features.grid))(source)
    if fill == "carry":
        source = _carried(source)
    x = jnp.take_along_axis(features.x, jnp.maximum(source, 0)[:, :, None], axis=1)
    x = jnp.where(source[:, :, None] < 0, jnp.zeros_like(x), x)
    return _as_map(x, features.grid)


def _as_map(x: Float[Array, "B M D"], grid: tuple[int, int]) -> Float[Array, "B H W D"]:
    return x.reshape(x.shape[0], *grid, x.shape[2])


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
