"""What several pictures draw on a photo's cells: greyed cells, borders between tokens, and maps of numbers."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from top_jax.figures.photo import Photo

GREY = np.array([225, 225, 225])
MAP = "cividis"  # perceptually uniform, made for all kinds of colour vision


def draw_photo(axes: Axes, photo: Photo, *, dropped: np.ndarray | None = None, pale: float = 0.0) -> None:
    """The photo in its place.

    Args:
        axes: in pixels of the model's input.
        photo: what is drawn.
        dropped: bool `[M]`: these patches lose their colour and almost all contrast.
        pale: share of white that is mixed into the whole.
    """
    height, width = photo.size
    pixels = photo.pixels * (1 - pale) + 255 * pale
    axes.imshow(pixels.astype(np.uint8), extent=(0, width, height, 0), interpolation="nearest")
    if dropped is None:
        return
    grey = photo.pixels.mean(axis=-1, keepdims=True) * 0.12 + GREY * 0.88
    veil = np.concatenate([np.broadcast_to(grey, pixels.shape), dropped[photo.places()][:, :, None] * 255], axis=-1)
    axes.imshow(veil.astype(np.uint8), extent=(0, width, height, 0), interpolation="nearest")


def draw_grid(axes: Axes, photo: Photo) -> None:
    """Thin borders of all cells."""
    left, right, bottom, top = photo.area
    rows, columns = photo.grid
    across = [[(left, top + r * photo.stride), (right, top + r * photo.stride)] for r in range(rows + 1)]
    down = [[(left + c * photo.stride, top), (left + c * photo.stride, bottom)] for c in range(columns + 1)]
    axes.add_collection(LineCollection(across + down, colors="white", linewidths=0.4, alpha=0.7))


def draw_borders(axes: Axes, photo: Photo, source: np.ndarray, *, colour: str, width: float = 1.1) -> None:
    """A line wherever two neighbouring cells belong to different tokens: `source` int `[M]`, any number for each."""
    left, _, _, top = photo.area
    cells, step = source.reshape(photo.grid), photo.stride
    lines = [
        [(left + (c + 1) * step, top + r * step), (left + (c + 1) * step, top + (r + 1) * step)]
        for r, c in np.argwhere(cells[:, 1:] != cells[:, :-1])
    ]
    lines += [
        [(left + c * step, top + (r + 1) * step), (left + (c + 1) * step, top + (r + 1) * step)]
        for r, c in np.argwhere(cells[1:] != cells[:-1])
    ]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="round"))


def draw_map(
    axes: Axes, photo: Photo, values: np.ndarray, low: float, high: float, *, log: bool = False
) -> ScalarMappable:
    """Numbers as colours; hatched grey where there is none.

    Args:
        axes: in pixels of the model's input.
        photo: whose cells are coloured.
        values: float `[M]`, NaN where there is no token.
        low: what has the darkest colour.
        high: what has the brightest.
        log: the same ratio is the same step in colour, wherever.
    """
    draw_hatched(axes, photo, np.isnan(values))
    cells = np.ma.masked_invalid(values.reshape(photo.grid))
    norm = LogNorm(low, high, clip=True) if log else Normalize(low, high)
    return axes.imshow(cells, extent=photo.area, interpolation="nearest", cmap=MAP, norm=norm, zorder=2)


def draw_hatched(axes: Axes, photo: Photo, chosen: np.ndarray) -> None:
    """Hatched grey over the cells of `chosen`, bool `[M]`."""
    left, _, _, top = photo.area
    side = photo.stride
    cells = [
        Rectangle((left + column * side, top + row * side), side, side)
        for row, column in np.argwhere(chosen.reshape(photo.grid))
    ]
    axes.add_collection(
        PatchCollection(cells, facecolor="#E6E6E6", edgecolor="#A6A6A6", hatch="/////", linewidth=0, zorder=1.5)
    )
