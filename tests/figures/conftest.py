"""Examinations written by hand: a 2 x 3 grid, one reduction from 6 to 3 tokens, nothing to compile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from top_jax.evaluation.trace import CLASS, BlockView, Trace, TracedStage
from top_jax.figures.examine import Examination
from top_jax.figures.photo import Photo

GRID = (2, 3)
WHOLE = [0, 1, 2, CLASS, 3, 4, 5]
KEPT = {"hold": [0, CLASS, 3, 5], "none, score order": [5, CLASS, 0, 3]}
SCORES = [0.7, 0.1, 0.2, 0.5, 0.3, 0.9]


def view(places):
    length = len(places)
    forward = np.arange(length)
    orders = np.stack([forward, forward[::-1]])[:, None]
    attention = np.arange(1.0, length * length + 1).reshape(1, length, length)
    return BlockView(np.array([places]), orders, attention.astype(np.float32))


@pytest.fixture
def examination() -> Examination:
    def trace(places):
        source = np.full(6, -1)
        patches = [place for place in places if place >= 0]
        source[patches] = np.arange(len(patches))
        stage = TracedStage(np.arange(6)[None], np.array([SCORES], np.float32), np.array([places]), source[None])
        stages = {} if places == WHOLE else {1: stage}
        return Trace(np.array([[0.0, 2.0]], np.float32), stages, {1: view(WHOLE), 2: view(places)})

    variants = {"dense": WHOLE, **KEPT}
    return Examination({name: trace(places) for name, places in variants.items()}, "hold", (1, 2))


@pytest.fixture
def photo() -> Photo:
    """Four drawn pixels per side of a model pixel; patches of 8, the first red and the others blue."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :, 2] = 200
    pixels[:32, :32] = (200, 0, 0)
    return Photo(pixels, (16, 24), GRID, 8, 8)


@pytest.fixture
def pixels_of() -> Callable[..., np.ndarray]:
    """Returns a function that draws a picture on a canvas of 96 x 64 pixels and returns them, uint8 `[64, 96, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def render(draw, photo):
        figure = Figure(figsize=(0.96, 0.64), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        draw(axes)
        axes.set(xlim=(0, photo.size[1]), ylim=(photo.size[0], 0), aspect="auto")
        axes.set_axis_off()
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3]

    return render
