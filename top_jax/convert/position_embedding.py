"""Resizes position embeddings to another image size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from top_jax.convert.key_maps import family_of
from top_jax.errors import InputError
from top_jax.models import BackboneConfig
from top_jax.models.layers import height_width
from top_jax.pruning import ClassHome


def fit_position_embedding(
    config: BackboneConfig, state_dict: dict[str, np.ndarray], checkpoint_img_size: int | tuple[int, int] | None
) -> list[str]:
    """Resizes the position embedding of an official state_dict, in place, if its grid is not the model's.

    Args:
        config: the model's.
        state_dict: float32 arrays by official name.
        checkpoint_img_size: the image size that the weights were trained at, side or (height, width) in pixels; None
            takes the model's grid if the number of patches agrees, else a square one.

    Returns:
        What was changed, in words: one line or none. An embedding of another width is left to the caller's checks.

    Raises:
        InputError: the number of patch tokens is not that of the grid.
    """
    name = family_of(config).position_embedding
    embedding = state_dict[name]
    if embedding.ndim != 3 or (embedding.shape[0], embedding.shape[2]) != (1, config.embed_dim):
        return []
    num_patches = embedding.shape[1] - (config.CLASS_TOKEN is not None)
    if checkpoint_img_size is not None:
        source = dataclasses.replace(config, img_size=height_width(checkpoint_img_size)).grid
    elif num_patches in (config.num_patches, 0):
        return []
    else:
        source = height_width(math.isqrt(num_patches))
    if source[0] * source[1] != num_patches:
        raise InputError(
            f"{name} has {num_patches} patch tokens, which is no {source[0]} x {source[1]} grid; pass "
            "checkpoint_img_size=(height, width), the size the checkpoint was trained at."
        )
    if source == config.grid:
        return []
    state_dict[name] = resize_position_embedding(embedding, source, config.grid, class_token=config.CLASS_TOKEN)
    (rows, columns), (new_rows, new_columns) = source, config.grid
    return [f"{name} resized from {rows} x {columns} to {new_rows} x {new_columns} patches (bicubic)"]


def resize_position_embedding(
    embedding: np.ndarray, source: tuple[int, int], target: tuple[int, int], *, class_token: ClassHome | None
) -> np.ndarray:
    """Interpolates a grid of position embeddings as torch's bicubic does (a = -0.75, no antialias).

    The class token's own embedding is taken out of the sequence and inserted at its place in the new one. (ViM has it
    in the *middle*; its official code takes index 0, a bug that shifts half of the grid by one place.)

    Args:
        embedding: `[1, M, D]`, or `[1, M + 1, D]` with a class token.
        source: rows and columns of the grid that `embedding` was trained on.
        target: rows and columns of the new grid.
        class_token: place of the class token: `first` (index 0, DeiT), `middle` (index M // 2, ViM), or None if there
            is none (PlainMamba).

    Returns:
        The embedding of the target grid, in the same dtype; `embedding` itself if the grids are equal.

    Source: torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    if source == target:
        return embedding
    place = _place(source, class_token)
    patches, cls = np.delete(embedding[0], place, axis=0), embedding[0][place]
    grid = patches.reshape(*source, -1).astype(np.float64)
    grid = np.einsum("ih,jw,hwd->ijd", _cubic_weights(source[0], target[0]), _cubic_weights(source[1], target[1]), grid)
    patches = grid.reshape(target[0] * target[1], -1).astype(embedding.dtype)
    return np.insert(patches, _place(target, class_token), cls, axis=0)[None]


def _place(grid: tuple[int, int], class_token: ClassHome | None) -> list[int]:
    """Returns the index of the class token among the tokens of a grid, as a list of one or none."""
    return {None: [], "first": [0], "middle": [grid[0] * grid[1] // 2]}[class_token]


def _cubic_weights(size: int, new_size: int, a: float = -0.75) -> np.ndarray:
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
