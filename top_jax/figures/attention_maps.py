"""Whom the class token (or, without one, the average token) sees: the scans' hidden attention, drawn on the image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable

from top_jax.evaluation.trace import CLASS, BlockView
from top_jax.figures.examine import DENSE, Examination
from top_jax.figures.page import Panel, Section, draw_map
from top_jax.figures.photo import Photo

DECADES = 1000
"""Ratio of the brightest to the darkest colour, at most: weights far from the class token go to nothing."""


class AttentionMaps(NamedTuple):
    """Of one image, by (variant, number of the block from 1).

    Attributes:
        matrix: float32 `[L, L]` weight of each token's input (second axis) in each token's output.
        places: int32 `[L]` raster place of each token; -1 the class token, -2 a fused one (EViT).
        weights: float32 `[M]` what is drawn: the class token's row of the matrix, or the mean of all rows without one,
            over its mean on the image's tokens (1: as much as the average token); NaN where there is no token.
    """

    matrix: dict[tuple[str, int], np.ndarray]
    places: dict[tuple[str, int], np.ndarray]
    weights: dict[tuple[str, int], np.ndarray]


def attention_maps(examination: Examination, num_patches: int) -> AttentionMaps:
    """Of the first image, of the blocks that were looked into."""
    maps = AttentionMaps({}, {}, {})
    for block in examination.blocks:
        for name, trace in examination.traces.items():
            view = trace.blocks[block]
            assert view.attention is not None
            key = (name, block)
            maps.matrix[key], maps.places[key] = np.asarray(view.attention[0]), np.asarray(view.places[0])
            maps.weights[key] = _weights(view, num_patches)
    return maps


def attention_section(maps: AttentionMaps, photo: Photo, *, scans: bool) -> Section:
    """A row per block, a panel per variant, all of a row on one scale.

    Args:
        maps: what is drawn.
        photo: whose cells are coloured.
        scans: the model's mixing is a scan's, not attention proper.
    """
    rows = []
    for block in dict.fromkeys(block for _, block in maps.weights):
        row = {name: weights for (name, number), weights in maps.weights.items() if number == block}
        same = all(np.array_equal(weights, row[DENSE]) for weights in row.values())
        if same and len(row) > 1:
            row = {"any variant, nothing dropped": row[DENSE]}
        everything = np.concatenate(list(row.values()))
        high = float(np.nanmax(everything))
        low = max(float(np.nanmin(everything)), high / DECADES)
        rows.append(
            [
                Panel(
                    f"block {block}, {name}: {np.isfinite(weights).sum()} tokens",
                    functools.partial(_draw, photo, weights, low, high),
                    "x mean",
                )
                for name, weights in row.items()
            ]
        )
    who = "the class token" if any((places == CLASS).any() for places in maps.places.values()) else "the average token"
    what = (
        "Weight of each patch's input in the output of {who}: the scan unrolled to y_i = sum_j alpha_ij u_j "
        "(arXiv 2403.01590), |alpha| of the sum of all directions, averaged over the channels"
        if scans
        else "Attention of {who} to each patch, averaged over the heads"
    )
    scale = "1 is the mean over the patches that are left (logarithmic scale)"
    note = f"{what.format(who=who)}; {scale}. Hatched: no token is left there."
    return Section("Hidden attention" if scans else "Attention", note, rows)


def _weights(view: BlockView, num_patches: int) -> np.ndarray:
    assert view.attention is not None
    matrix, places = view.attention[0], view.places[0]
    seen = matrix[places == CLASS].mean(axis=0) if (places == CLASS).any() else matrix.mean(axis=0)
    weights = np.full(num_patches, np.nan, np.float32)
    weights[places[places >= 0]] = seen[places >= 0] / seen[places >= 0].mean()
    return weights


def _draw(photo: Photo, weights: np.ndarray, low: float, high: float, axes: Axes) -> ScalarMappable:
    return draw_map(axes, photo, weights, low, high, log=True)
