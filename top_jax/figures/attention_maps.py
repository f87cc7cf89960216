"""How much the class token (or, without one, the average token) attends to each patch, drawn on the image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from top_jax.evaluation.trace import CLASS, BlockView
from top_jax.figures.examine import DENSE, Examination
from top_jax.figures.page import Panel, Section, draw_map
from top_jax.figures.photo import Photo
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

DECADES = 1000
"""Largest ratio of the brightest to the darkest colour: weights far from the class token approach zero."""


class AttentionMaps(NamedTuple):
    """The attention of one image, by (variant, number of the block from 1).

    Attributes:
        matrix: float32 `[L, L]`, the weight of each token's input (second axis) in each token's output.
        places: int32 `[L]`, the raster index of each token; -1 is the class token, -2 a fused token (EViT).
        weights: float32 `[M]`, what is drawn: the class token's row of the matrix, or the mean of all rows in a model
            without one. They are divided by their mean over the patch tokens, so that 1 is an average token's weight;
            NaN where there is no token.
    """

    matrix: dict[tuple[str, int], np.ndarray]
    places: dict[tuple[str, int], np.ndarray]
    weights: dict[tuple[str, int], np.ndarray]


def attention_maps(examination: Examination, num_patches: int) -> AttentionMaps:
    """Returns the attention in the examined blocks of the image."""
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
    """Returns a row per block with a panel per variant; the panels of a row share their colour scale.

    Args:
        maps: what is drawn.
        photo: the photo whose cells are coloured.
        scans: whether the model mixes tokens by scans, not by attention.
    """
    rows = []
    for block in dict.fromkeys(block for _, block in maps.weights):
        row = {name: weights for (name, number), weights in maps.weights.items() if number == block}
        same = all(np.array_equal(weights, row[DENSE]) for weights in row.values())
        if same and len(row) > 1:
            row = {"all variants (nothing dropped yet)": row[DENSE]}
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
        "(arXiv 2403.01590); |alpha|, summed over directions before the absolute value, averaged over channels"
        if scans
        else "Attention of {who} to each patch, averaged over the heads"
    )
    scale = "1 is the mean over the remaining patches (logarithmic scale)"
    note = f"{what.format(who=who)}; {scale}. Hatched: dropped patches."
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
