"""The paths of the scans through an image, before and after its first reduction (ToP's figures 1 and 2).

At the first reduction all variants have the same scores and keep the same tokens: only their paths differ.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.examine import DENSE, Examination
from top_jax.figures.page import GREEN, PANEL, PURPLE, VERMILLION, Panel, Section, draw_grid, draw_hatched, draw_photo
from top_jax.figures.photo import Photo
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection

PATHS = {
    2: ("forward", "backward"),
    4: ("rows from the top", "rows from the bottom", "columns from the left", "columns from the right"),
}
ALONG = "viridis"
BRIGHTEST = 0.9  # end of the range of ALONG: its brightest yellow cannot be seen on a pale photo


class ScanPaths(NamedTuple):
    """The paths of the scans of one image, in the block after the first reduction.

    Attributes:
        block: the number of that block, counted from 1.
        steps: by variant, int32 `[G, L]`: the raster index of the token at each step of each of G paths, in the order
            of the scan; -1 is the class token, -2 a fused token (EViT).
        gaps: by variant, int32 `[G, L]`: how many dropped tokens an aligned path passes before each step; 0 without
            alignment.
    """

    block: int
    steps: dict[str, np.ndarray]
    gaps: dict[str, np.ndarray]


def scan_paths(examination: Examination) -> ScanPaths | None:
    """Returns the paths of the examined image; those of the first block if the model is dense.

    Returns None for a model without scans, and if the dense variant was not examined.
    """
    if DENSE not in examination.traces:
        return None
    block = min(examination.own.stages, default=0) + 1
    steps: dict[str, np.ndarray] = {}
    for name, trace in examination.traces.items():
        view = trace.blocks[block]
        if view.orders is None:
            return None
        steps[name] = np.asarray(view.places[0])[np.asarray(view.orders)[:, 0]]
    whole = steps[DENSE]
    gaps = {name: _gaps(whole, path) if _aligned(name) else np.zeros_like(path) for name, path in steps.items()}
    return ScanPaths(block, steps, gaps)


def paths_section(paths: ScanPaths, photo: Photo) -> Section:
    """Returns a panel per path and direction; variants with the same path, such as `hold` and `decay`, share one."""
    panels, walks = [], {}
    for name, steps in paths.steps.items():
        walks.setdefault((steps.tobytes(), paths.gaps[name].tobytes()), []).append(name)
    for names in walks.values():
        for g, direction in enumerate(PATHS[len(paths.steps[names[0]])]):
            draw = functools.partial(_draw, photo, paths.steps[names[0]][g], paths.gaps[names[0]][g])
            panels.append(Panel(f"{' = '.join(names)}: {direction}", draw))
    note = (
        f"Order in which block {paths.block} reads its tokens, from dark to bright. Green dot: first token. Orange "
        "square: last token. Hatched: dropped patches. Dotted: an aligned scan (hold, decay) passes dropped patches. "
        "Thin: a jump between patches that are not neighbours, to a new row or, without alignment ('none'), anywhere."
    )
    if any((steps == CLASS).any() for steps in paths.steps.values()):
        note += " Star: the class token, drawn between its neighbours in the scan: it has no place on the image."
    return Section("Paths of the scans", note, [panels])


def _aligned(name: str) -> bool:
    return name in ("hold", "decay")


def _gaps(whole: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Returns how many steps of the dense path `[G, M]` are missing before each step of a pruned path `[G, L]`."""
    gaps = np.zeros_like(steps)
    for g in range(len(whole)):
        step_of = {int(place): step for step, place in enumerate(whole[g])}
        gaps[g, 1:] = np.diff([step_of[int(place)] for place in steps[g]]) - 1
    return gaps


def _draw(photo: Photo, steps: np.ndarray, gaps: np.ndarray, axes: Axes) -> ScalarMappable | None:
    there = np.isin(np.arange(photo.grid[0] * photo.grid[1]), steps)
    draw_photo(axes, photo, pale=0.72)
    draw_hatched(axes, photo, ~there)
    draw_grid(axes, photo)
    points = photo.centres(np.maximum(steps, 0))
    placeless = np.flatnonzero(steps < 0)
    for step in placeless:
        near = [other for other in (step - 1, step + 1) if 0 <= other < len(steps)]
        points[step] = points[near].mean(axis=0)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    along = np.linspace(0, BRIGHTEST, len(segments))
    moves = np.abs(segments[:, 1] - segments[:, 0]).max(axis=-1) / photo.stride
    unit = 72 * PANEL / photo.size[1] * photo.stride  # a cell's side in points
    width = min(max(unit / 7, 0.9), 2.5)
    passed, jump = gaps[1:] > 0, (gaps[1:] == 0) & (moves > 1.5)
    for chosen, style, share in ((~passed & ~jump, "-", 1.0), (passed, (0, (1, 1)), 0.9), (jump, "-", 0.45)):
        lines = LineCollection(
            list(segments[chosen]),
            linewidths=width * share,
            linestyles=[style],
            array=along[chosen],
            cmap=ALONG,
            zorder=3,
        )
        lines.set_clim(0, 1)
        axes.add_collection(lines)
    size = min(max(unit * 0.55, 4.0), 9.0)
    axes.plot(*points[0], "o", color=GREEN, markersize=size, markeredgecolor="white", markeredgewidth=0.6, zorder=5)
    axes.plot(
        *points[-1], "s", color=VERMILLION, markersize=size, markeredgecolor="white", markeredgewidth=0.6, zorder=5
    )
    for step in placeless:
        marker = "*" if steps[step] == CLASS else "D"
        axes.plot(
            *points[step],
            marker,
            color=PURPLE,
            markersize=size * 1.6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=6,
        )
    return None
