"""Accuracy against cost: the alignments as curves, the scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from top_jax.ablation.statistics import Cell
from top_jax.ablation.tables import CONVENTION

# Okabe and Ito's colours, told apart by people with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
GREY: Final = "#666666"
WAYS: Final = {
    ("none", "score"): ("none, score order (naive)", VERMILION, "s", ":"),
    ("none", "position"): ("none", ORANGE, "D", "-."),
    ("hold", "position"): ("hold", BLUE, "o", "-"),
    ("decay", "position"): ("decay", GREEN, "^", "--"),
}
CONTROLS: Final = ("random", "uniform")


def draw(cells: Sequence[Cell], base: dict[str, Any], file: Path) -> None:
    """Draws one row of panels for each training (none first).

    On the left accuracy against GMACs for each alignment at the base score, with the dense model; on the right the
    scores at the base keep ratio and alignment. Bars are the standard deviation over runs where there are several, and
    the standard error over images otherwise; each panel says which.

    Args:
        cells: of `summarise`.
        base: the point at which the tables cross.
        file: PNG, overwritten.
    """
    trainings = list(dict.fromkeys(cell.finetuned for cell in cells))
    figure = Figure(figsize=(11, 4.4 * len(trainings)), layout="constrained")
    panels = figure.subplots(len(trainings), 2, squeeze=False, width_ratios=(3, 2))
    for training, (left, right) in zip(trainings, panels, strict=True):
        some = [cell for cell in cells if cell.finetuned == training]
        title = "without training" if training is None else f"fine-tuned, {training[0]} steps at {training[1]:g}"
        _curves(left, some, base, title)
        _scores(right, some, base, title)
    figure.savefig(file, dpi=150)


def _curves(axes: Axes, cells: Sequence[Cell], base: dict[str, Any], title: str) -> None:
    dense = [cell for cell in cells if cell.is_dense]
    shown = list(dense)
    for (alignment, order), (label, colour, marker, style) in WAYS.items():
        some = [
            cell
            for cell in cells
            if (cell.alignment, cell.order, cell.score) == (alignment, order, base["score"])
        ]
        if some:
            some.sort(key=lambda cell: cell.gmacs[CONVENTION])
            shown += some
            _bars(axes, some, label=label, color=colour, marker=marker, linestyle=style)
    _bars(axes, dense, label="dense", color=BLACK, marker="*", linestyle="none", markersize=13)
    axes.set_title(f"Alignment ({base['score']}), {title}", fontsize=11)
    axes.set_xlabel(f"GMACs per image ({CONVENTION} convention)")
    axes.set_ylabel(f"accuracy, %  ({_meaning(shown)})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="best")


def _bars(axes: Axes, cells: list[Cell], **style: Any) -> None:
    x = [cell.gmacs[CONVENTION] for cell in cells]
    y = [100 * cell.accuracy.mean for cell in cells]
    style = {"capsize": 3, "linewidth": 1.6, "elinewidth": 1.1, "markersize": 7, **style}
    axes.errorbar(x, y, yerr=[100 * _error(cell) for cell in cells], **style)


def _scores(axes: Axes, cells: Sequence[Cell], base: dict[str, Any], title: str) -> None:
    """One line per score, best on top; controls hollow."""
    ratio = tuple(base["keep_ratio"]) if isinstance(base["keep_ratio"], list) else base["keep_ratio"]
    point = (base["alignment"], base["order"], ratio)
    some = [cell for cell in cells if (cell.alignment, cell.order, cell.keep_ratio) == point]
    some.sort(key=lambda cell: cell.accuracy.mean)
    for place, cell in enumerate(some):
        control = cell.score in CONTROLS
        axes.errorbar(
            100 * cell.accuracy.mean,
            place,
            xerr=100 * _error(cell),
            color=GREY if control else BLUE,
            marker="o",
            markerfacecolor="white" if control else BLUE,
            markersize=7,
            capsize=3,
        )
    for dense in (cell for cell in cells if cell.is_dense):
        axes.axvline(100 * dense.accuracy.mean, color=BLACK, linestyle=":", linewidth=1.2, label="dense")
        axes.legend(fontsize=9, loc="lower left")
    labels = [f"{cell.score}\n(control)" if cell.score in CONTROLS else f"{cell.score}" for cell in some]
    axes.set_yticks(range(len(some)), labels)
    axes.set_ylim(-0.7, max(len(some), 1) - 0.3)
    axes.set_title(f"Score ({base['alignment']}, keep {base['keep_ratio']}), {title}", fontsize=11)
    axes.set_xlabel(f"accuracy, %  ({_meaning(some)})")
    axes.grid(alpha=0.3, axis="x")


def _error(cell: Cell) -> float:
    return cell.accuracy.sampling_error if cell.accuracy.spread is None else cell.accuracy.spread


def _meaning(cells: Sequence[Cell]) -> str:
    """What the bars are."""
    kinds = {cell.accuracy.spread is None for cell in cells}
    over_images, over_runs = "s.e. over images", "s.d. over runs"
    if kinds == {True, False}:
        return f"bars: {over_runs}, of one run {over_images}"
    return f"bars: {over_images if kinds == {True} else over_runs}"
