"""The numbers by which tokens were ranked, where they are on the image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable

from top_jax.evaluation.trace import Trace
from top_jax.figures.cells import draw_borders, draw_map
from top_jax.figures.page import Panel, Section
from top_jax.figures.photo import Photo


class ScoreMaps(NamedTuple):
    """Of one image, at each of S reductions.

    Attributes:
        after_blocks: int32 `[S]`, from 1.
        scores: float32 `[S, M]` score of the token at each patch, NaN where it was gone already. A fused token's
            (EViT) has no place and is not here.
        kept: bool `[S, M]` whether the patch's token stayed.
    """

    after_blocks: np.ndarray
    scores: np.ndarray
    kept: np.ndarray


def score_maps(trace: Trace, num_patches: int) -> ScoreMaps | None:
    """Of the first image of a trace (numpy arrays); None where nothing was ranked."""
    found = {block: stage for block, stage in trace.stages.items() if stage.scores is not None}
    if not found:
        return None
    scores = np.full((len(found), num_patches), np.nan, np.float32)
    for row, stage in zip(scores, found.values(), strict=True):
        places = stage.candidates[0]
        assert stage.scores is not None
        row[places[places >= 0]] = stage.scores[0][places >= 0]
    kept = np.stack([stage.source[0] >= 0 for stage in found.values()])
    return ScoreMaps(np.array(list(found), np.int32), scores, kept)


def section(maps: ScoreMaps, photo: Photo, *, score: str) -> Section:
    """A map per reduction, each with a scale of its own.

    Args:
        maps: what is drawn.
        photo: whose cells are coloured.
        score: its name, as in `Pruning.score`.
    """
    panels = [
        Panel(f"'{score}' at the end of block {block}", functools.partial(_draw, photo, scores, kept), "score")
        for block, scores, kept in zip(maps.after_blocks, maps.scores, maps.kept, strict=True)
    ]
    note = "Higher (brighter) stays. White lines part what was kept from what was dropped; hatched: dropped earlier."
    return Section("Scores that tokens were ranked by", note, [panels])


def _draw(photo: Photo, scores: np.ndarray, kept: np.ndarray, axes: Axes) -> ScalarMappable:
    shown = draw_map(axes, photo, scores, float(np.nanmin(scores)), float(np.nanmax(scores)))
    draw_borders(axes, photo, kept, colour="white")
    return shown
