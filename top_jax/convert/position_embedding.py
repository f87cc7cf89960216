"""Position embeddings for another image size."""

from __future__ import annotations

import numpy as np

from top_jax.pruning import ClassHome


def resize_position_embedding(
    embedding: np.ndarray, source: tuple[int, int], target: tuple[int, int], *, class_token: ClassHome | None
) -> np.ndarray:
    """Interpolates a grid of position embeddings the way torch's bicubic does (a = -0.75, no antialias).

    The class token's own embedding is taken out of the sequence and put back into its place in the new one. (ViM has
    it in the *middle*; its official code takes index 0 all the same, which shifts half of the grid by one place.)

    Args:
        embedding: `[1, M, D]`, or `[1, M + 1, D]` with a class token.
        source: rows and columns of the grid that `embedding` was trained on.
        target: rows and columns wanted.
        class_token: where there is one: `first` (index 0, DeiT), `middle` (index M // 2, ViM) or None (PlainMamba).

    Returns:
        The same, for the target grid; `embedding` itself where the grids are equal.

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
    """Indices of the class token among the patches of a grid: one or none."""
    return {None: [], "first": [0], "middle": [grid[0] * grid[1] // 2]}[class_token]


def _cubic_weights(size: int, new_size: int, a: float = -0.75) -> np.ndarray:
    """`[new_size, size]` interpolation matrix: half-pixel centres, four taps, edges repeated."""
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
