"""The sections of a classifier's sheet, drawn from the arrays of `top_jax.figures.examine.ARRAYS`.

kept_section        remaining tokens
scores_section      the scores that tokens were ranked by
paths_section       the order in which the scans visit the tokens (ToP's figures 1 and 2)
attention_section   hidden attention of the scans, or a DeiT's attention
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.examine import DENSE, Arrays
from top_jax.figures.page import (
    GREEN,
    PANEL,
    PURPLE,
    VERMILLION,
    Panel,
    Section,
    draw_borders,
    draw_grid,
    draw_hatched,
    draw_map,
    draw_photo,
)
from top_jax.figures.photo import Photo
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection

PATHS: Final = {
    2: ("forward", "backward"),
    4: ("rows from the top", "rows from the bottom", "columns from the left", "columns from the right"),
}
ALONG: Final = "viridis"
BRIGHTEST: Final = 0.9  # end of the range of ALONG: its brightest yellow cannot be seen on a pale photo
DECADES: Final = 1000
"""Largest ratio of the brightest to the darkest colour: weights far from the class token approach zero."""


def kept_section(arrays: Arrays, photo: Photo, *, merges: bool) -> Section:
    """Returns a panel with the model's input, and one with the remaining tokens after each reduction.

    Args:
        arrays: what is drawn.
        photo: the photo to draw on.
        merges: whether tokens were merged, not dropped.
    """
    (rows, columns), after_blocks = photo.grid, arrays["after_blocks"]
    patches = rows * columns
    panels = [Panel(f"input: {rows} x {columns} = {patches} tokens", functools.partial(_input, photo))]
    for block, tokens, fused, source in zip(
        after_blocks, arrays["tokens"], arrays["fused"], arrays["source"], strict=True
    ):
        if merges:
            left = f"{patches} patches in {tokens} tokens"
        else:
            left = f"{tokens - fused} of {patches} tokens kept" + (f", the rest fused into {fused}" if fused else "")
        panels.append(Panel(f"after block {block}: {left}", functools.partial(_stage, photo, source)))
    if not len(after_blocks):
        note = "This model is dense: every token passes through every block."
    elif merges:
        note = "Merged patches have their mean colour and no line between them; a token may consist of several pieces."
    else:
        note = "Patches in colour are kept, grey ones were dropped. Lines separate kept and dropped patches."
    return Section("Remaining tokens", note, [panels])


def _input(photo: Photo, axes: Axes) -> None:
    draw_photo(axes, photo)
    draw_grid(axes, photo)


def _stage(photo: Photo, source: np.ndarray, axes: Axes) -> None:
    draw_photo(axes, _merged(photo, source), dropped=(source < 0)[photo.places()])
    draw_grid(axes, photo)
    alone = np.bincount(source[source >= 0]).max(initial=0) <= 1
    draw_borders(axes, photo, source >= 0 if alone else source, colour=VERMILLION)


def _merged(photo: Photo, source: np.ndarray) -> Photo:
    """Returns the photo with merged patches in their mean colour."""
    shares = np.bincount(source[source >= 0], minlength=1)
    if shares.max(initial=0) <= 1:
        return photo
    token = source[photo.places()]
    sums = np.stack([np.bincount(token.ravel(), photo.pixels[:, :, c].ravel()) for c in range(3)], -1)
    means = sums / np.maximum(np.bincount(token.ravel()), 1)[:, None]
    several = (shares > 1)[token]
    return photo._replace(pixels=np.where(several[:, :, None], means[token], photo.pixels).astype(np.uint8))


def scores_section(arrays: Arrays, photo: Photo, *, score: str) -> Section:
    """Returns one map per reduction, each with a colour scale of its own.

    Args:
        arrays: what is drawn.
        photo: the photo whose cells are coloured.
        score: the name of the score, as in `Pruning.score`.
    """
    panels = [
        Panel(f"'{score}' at the end of block {block}", functools.partial(_draw_scores, photo, scores, kept), "score")
        for block, scores, kept in zip(arrays["after_blocks"], arrays["scores"], arrays["kept"], strict=True)
    ]
    note = (
        "Tokens with the highest (brightest) scores are kept. White lines separate kept and dropped patches. Hatched: "
        "patches that were dropped earlier."
    )
    return Section("Scores of the tokens", note, [panels])


def _draw_scores(photo: Photo, scores: np.ndarray, kept: np.ndarray, axes: Axes) -> ScalarMappable:
    shown = draw_map(axes, photo, scores, float(np.nanmin(scores)), float(np.nanmax(scores)))
    draw_borders(axes, photo, kept, colour="white")
    return shown


def paths_section(arrays: Arrays, photo: Photo) -> Section:
    """Returns a panel per path and direction; variants with the same path, such as `hold` and `decay`, share one.

    At the first reduction all variants have the same scores and keep the same tokens: only their paths differ.
    """
    paths, gaps = (
        {key.partition("/")[2]: array for key, array in arrays.items() if key.startswith(kind)}
        for kind in ("path/", "gaps/")
    )
    walks: dict[tuple[bytes, bytes], list[str]] = {}
    for name, steps in paths.items():
        walks.setdefault((steps.tobytes(), gaps[name].tobytes()), []).append(name)
    panels = []
    for first, *same in walks.values():
        for g, direction in enumerate(PATHS[len(paths[first])]):
            draw = functools.partial(_draw_path, photo, paths[first][g], gaps[first][g])
            panels.append(Panel(f"{' = '.join((first, *same))}: {direction}", draw))
    block = 1 + min(arrays["after_blocks"], default=0)
    note = (
        f"Order in which block {block} reads its tokens, from dark to bright. Green dot: first token. Orange square: "
        "last token. Hatched: dropped patches. Dotted: an aligned scan (hold, decay) passes dropped patches. Thin: a "
        "jump between patches that are not neighbours, to a new row or, without alignment ('none'), anywhere."
    )
    if any((steps == CLASS).any() for steps in paths.values()):
        note += " Star: the class token, drawn between its neighbours in the scan: it has no place on the image."
    return Section("Paths of the scans", note, [panels])


def _draw_path(photo: Photo, steps: np.ndarray, gaps: np.ndarray, axes: Axes) -> None:
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
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
    axes.plot(*points[0], "o", color=GREEN, markersize=size, zorder=5, **edge)
    axes.plot(*points[-1], "s", color=VERMILLION, markersize=size, zorder=5, **edge)
    for step in placeless:
        marker = "*" if steps[step] == CLASS else "D"
        axes.plot(*points[step], marker, color=PURPLE, markersize=size * 1.6, zorder=6, **edge)


def attention_section(arrays: Arrays, photo: Photo, *, scans: bool) -> Section:
    """Returns a row per block with a panel per variant; the panels of a row share their colour scale.

    Args:
        arrays: what is drawn.
        photo: the photo whose cells are coloured.
        scans: whether the model mixes tokens by scans, not by attention.
    """
    maps: dict[str, Arrays] = {}
    for key in (key for key in arrays if key.startswith("attention_map/")):
        _, variant, block = key.split("/")
        maps.setdefault(block, {})[variant] = arrays[key]
    rows = []
    for block, row in maps.items():
        if len(row) > 1 and all(np.array_equal(weights, row[DENSE]) for weights in row.values()):
            row = {"all variants (nothing dropped yet)": row[DENSE]}
        everything = np.concatenate(list(row.values()))
        high = float(np.nanmax(everything))
        low = max(float(np.nanmin(everything)), high / DECADES)
        panels = []
        for name, weights in row.items():
            draw = functools.partial(draw_map, photo=photo, values=weights, low=low, high=high, log=True)
            panels.append(Panel(f"block {block}, {name}: {np.isfinite(weights).sum()} tokens", draw, "x mean"))
        rows.append(panels)
    has_class = any((places == CLASS).any() for key, places in arrays.items() if key.startswith("places/"))
    who = "the class token" if has_class else "the average token"
    if scans:
        what = (
            f"Weight of each patch's input in the output of {who}: the scan unrolled to y_i = sum_j alpha_ij u_j "
            "(arXiv 2403.01590); |alpha|, summed over directions before the absolute value, averaged over channels"
        )
    else:
        what = f"Attention of {who} to each patch, averaged over the heads"
    note = f"{what}; 1 is the mean over the remaining patches (logarithmic scale). Hatched: dropped patches."
    return Section("Hidden attention" if scans else "Attention", note, rows)
