"""A classifier's sheet for one image: all pictures in one PNG, and all of their arrays in one .npz.

Its sections, drawn from the arrays of `top_jax.figures.examine.ARRAYS`: remaining tokens, the scores that tokens were
ranked by, the order in which the scans visit the tokens (ToP's figures 1 and 2), and hidden attention of the scans or a
DeiT's attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.examine import DENSE, Arrays, Examination, arrays_of
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
    draw_page,
    draw_photo,
)
from top_jax.figures.photo import Photo, Picture
from top_jax.files import write_arrays
from top_jax.models import Backbone, Deit
from top_jax.optional import needs_extras
from top_jax.pruning import Evit, Merging, Pruning, Reduction

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection

KINDS: Final = ("tokens", "scores", "paths", "attention")
"""The sections of a sheet."""
PATHS: Final = {
    2: ("forward", "backward"),
    4: ("rows from the top", "rows from the bottom", "columns from the left", "columns from the right"),
}
ALONG: Final = "viridis"
BRIGHTEST: Final = 0.9  # end of the range of ALONG: its brightest yellow cannot be seen on a pale photo
DECADES: Final = 1000
"""Largest ratio of the brightest to the darkest colour: weights far from the class token approach zero."""


def draw_sheet(
    stem: Path,
    picture: Picture,
    photo: Photo,
    examination: Examination,
    model: Backbone,
    *,
    about: str,
    class_names: tuple[str, ...],
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Any]:
    """Writes `stem`.png and `stem`.npz (see `top_jax.figures.examine.ARRAYS`).

    Args:
        stem: path of both files, without a suffix.
        picture: the image.
        photo: the part of it that the model sees.
        examination: its forward passes.
        model: the model as configured.
        about: the model in words; its reduction is added.
        class_names: the name of each label.
        kinds: the sections to draw, out of `KINDS`. All arrays that were computed are written in any case.

    Returns:
        The sheet's entry in an index of sheets: JSON values.

    Raises:
        OSError: the files cannot be written.
    """
    arrays = arrays_of(examination, model.config.num_patches)
    sections = {"tokens": kept_section(arrays, photo, merges=isinstance(model.reduction, Merging))}
    if "scores" in arrays:
        sections["scores"] = scores_section(arrays, photo, score=str(model.reduction.needed_evidence))
    if any(name.startswith("path/") for name in arrays):
        sections["paths"] = paths_section(arrays, photo)
    if examination.blocks:
        sections["attention"] = attention_section(arrays, photo, scans=not isinstance(model, Deit))
    prediction = _prediction(arrays["logits"], picture.label, class_names)
    predicted, share = as_class(prediction["prediction"]), 100 * prediction["probability"]
    title = f"{picture.name}: predicted {predicted} ({share:.0f} %)"
    if prediction["label"] is not None:
        title += f", labelled {as_class(prediction['label'])}"
    subtitle = f"{about}; {describe_reduction(model.reduction)}."
    chosen = [section for kind, section in sections.items() if kind in kinds]
    tokens = zip(arrays["after_blocks"], arrays["tokens"], strict=True)
    return {
        "image": picture.name,
        **write_sheet(stem, title, subtitle, photo, chosen, {"grid": np.array(photo.grid), **arrays}),
        **prediction,
        "predictions": {name: class_names[one.logits[0].argmax()] for name, one in examination.traces.items()},
        "tokens": {str(block): int(count) for block, count in tokens},
        "class_token": bool((examination.own.blocks[1].places == CLASS).any()),
    }


def write_sheet(
    stem: Path, title: str, subtitle: str, photo: Photo, sections: Sequence[Section], arrays: Arrays
) -> dict[str, str]:
    """Writes `stem`.png, and `stem`.npz with the photo and other arrays; returns their names, for an index of sheets.

    Raises:
        OSError: the files cannot be written.
    """
    png, npz = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "npz"))
    draw_page(png, title, subtitle, photo, sections)
    write_arrays(npz, {"photo": photo.pixels, **arrays})
    return {"png": png.name, "npz": npz.name}


def describe_reduction(reduction: Reduction) -> str:
    """Returns one line of text that describes a reduction."""
    if not reduction.after_blocks:
        return "dense"
    verb = {Merging: "merged", Evit: "pruned by EViT"}.get(type(reduction), "pruned")
    ratios = reduction.ratios[:1] if len(set(reduction.ratios)) == 1 else reduction.ratios
    shares = ", ".join(f"{100 * ratio:g}" for ratio in ratios)
    several = len(reduction.after_blocks) > 1
    blocks = f"{'blocks' if several else 'block'} {', '.join(map(str, reduction.after_blocks))}"
    text = f"{verb} after {blocks} to {shares} %{' each time' if several and len(ratios) == 1 else ''}"
    if reduction.needed_evidence is not None:
        text += f", score '{reduction.needed_evidence}'"
    if isinstance(reduction, Pruning | Evit) and reduction.order != "position":
        text += f", in {reduction.order} order"
    return f"{text}, alignment '{reduction.alignment}'"


def as_class(name: str) -> str:
    """Returns a class's name for a sentence: `class 3` for a name that is a number."""
    return f"class {name}" if name.isdecimal() else name


def _prediction(logits: np.ndarray, label: int | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    shares = np.exp(logits - logits.max())
    best = int(np.argmax(logits))
    return {
        "prediction": class_names[best],
        "probability": float(shares[best] / shares.sum()),
        "label": None if label is None else class_names[label],
    }


def kept_section(arrays: Arrays, photo: Photo, *, merges: bool) -> Section:
    """Returns a panel with the model's input, and one with the tokens that were kept or merged by each reduction."""
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
    """Returns one map per reduction, each with a colour scale of its own; `score` is that of `Pruning`."""
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
        note += " Star: the class token, drawn between its neighbours in the scan, because it is not a patch."
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

    `scans` is True for a model that mixes tokens by scans, False for one with attention.
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
