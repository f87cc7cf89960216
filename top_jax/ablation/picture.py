"""The picture of an ablation: accuracy (or mIoU) against cost for each alignment, and for each score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from top_jax.ablation.results import ratio_of, ratio_text
from top_jax.ablation.statistics import Cell
from top_jax.ablation.tables import CONVENTION
from top_jax.figures.page import BLACK, BLUE, GREEN, ORANGE, VERMILLION
from top_jax.files import new_file
from top_jax.optional import needs_extras
from top_jax.pruning.score import CONTROLS

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY: Final = "#666666"
# The curve of `hold` is broad, because `decay` often lies on top of it.
STYLES: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("none", "score"): {"label": "none, score order (naive)", "color": VERMILLION, "marker": "s", "linestyle": ":"},
    ("none", "position"): {"label": "none", "color": ORANGE, "marker": "D", "linestyle": "-."},
    ("hold", "position"): {"label": "hold", "color": BLUE, "marker": "o", "linewidth": 3.5, "markersize": 10},
    ("decay", "position"): {"label": "decay", "color": GREEN, "marker": "^", "linestyle": "--", "markersize": 6},
}


def draw(cells: Sequence[Cell], base: dict[str, Any], file: Path) -> None:
    """Draws one row of two panels per fine-tuning, without fine-tuning first.

    On the left: accuracy, or a segmenter's mIoU, against multiply-accumulates (of its backbone) for each alignment at
    the base score, with the dense model. On the right: the scores at the base keep ratio and alignment. A segmenter's
    fill is the base's. Bars are the standard deviation over runs if there are several, else the standard error over
    images; the label of each panel names them.

    Args:
        cells: from `summarise`.
        base: fields of the setting that all tables share.
        file: the PNG, overwritten if it is there.

    Raises:
        OSError: the file cannot be written.
    """
    cells = [cell for cell in cells if cell.is_dense or cell.fill == base.get("fill")]
    trainings = list(dict.fromkeys(cell.finetuned for cell in cells))
    mega = max(cell.pruned_gmacs[CONVENTION] for cell in cells) < 0.1
    figure = Figure(figsize=(11, 0.5 + 4.6 * len(trainings)), layout="constrained")
    panels = figure.subplots(len(trainings), 2, squeeze=False, width_ratios=(3, 2))
    for training, (left, right) in zip(trainings, panels, strict=True):
        some = [cell for cell in cells if cell.finetuned == training]
        title = "without training" if training is None else f"after {training[0]} steps at {training[1]:g}"
        _curves(left, some, base["score"], mega=mega)
        left.set_title(f"Alignment (score {base['score']}), {title}", fontsize=11)
        _scores(right, some, base)
        right.set_title(f"Score ({base['alignment']}, keep {ratio_text(base['keep_ratio'])}), {title}", fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=10, frameon=False)
    with new_file(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _curves(axes: Axes, cells: Sequence[Cell], score: str, *, mega: bool) -> None:
    per_giga, shown = 1e3 if mega else 1.0, []
    for way, style in STYLES.items():
        some = [cell for cell in cells if (cell.alignment, cell.order) == way and cell.score == score]
        if some:
            some.sort(key=lambda cell: cell.pruned_gmacs[CONVENTION])
            _curve(axes, some, per_giga, **style)
            shown += some
    dense = [cell for cell in cells if cell.is_dense]
    _curve(axes, dense, per_giga, label="dense", color=BLACK, marker="*", linestyle="none", markersize=14)
    of = "of the backbone per crop" if any(cell.backbone_gmacs for cell in cells) else "per image"
    axes.set_xlabel(f"{'MMACs' if mega else 'GMACs'} {of} ({CONVENTION} convention)\n{_meaning(shown + dense)}")
    axes.set_ylabel(f"{_title(cells)}, %")
    axes.grid(alpha=0.3)


def _curve(axes: Axes, cells: list[Cell], per_giga: float, **style: Any) -> None:
    x = [cell.pruned_gmacs[CONVENTION] * per_giga for cell in cells]
    y = [100 * cell.result.mean for cell in cells]
    usual = {"capsize": 3, "linewidth": 1.6, "elinewidth": 1.1, "markersize": 7}
    axes.errorbar(x, y, yerr=[100 * _error(cell) for cell in cells], **{**usual, **style})


def _scores(axes: Axes, cells: Sequence[Cell], base: dict[str, Any]) -> None:
    """Draws one line per score, the best on top, controls with hollow markers."""
    point = (base["alignment"], base["order"], ratio_of(base))
    some = [cell for cell in cells if (cell.alignment, cell.order, cell.keep_ratio) == point]
    some.sort(key=lambda cell: cell.result.mean)
    for place, cell in enumerate(some):
        control = cell.score in CONTROLS
        colour, fill = (GREY, "white") if control else (BLUE, BLUE)
        style = {"color": colour, "marker": "o", "markerfacecolor": fill, "markersize": 7, "capsize": 3}
        axes.errorbar(100 * cell.result.mean, place, xerr=100 * _error(cell), **style)
    for dense in (cell for cell in cells if cell.is_dense):
        x = 100 * dense.result.mean
        axes.axvline(x, color=BLACK, linestyle=":", linewidth=1.2)
        side = "right" if x > sum(axes.get_xlim()) / 2 else "left"  # where there is room
        axes.annotate(" dense ", (x, -0.55), ha=side, fontsize=9)
    labels = [f"{cell.score}\n(control)" if cell.score in CONTROLS else f"{cell.score}" for cell in some]
    axes.set_yticks(range(len(some)), labels)
    axes.set_ylim(-0.7, max(len(some), 1) - 0.3)
    axes.set_xlabel(f"{_title(cells)}, %\n{_meaning(some)}")
    axes.grid(alpha=0.3, axis="x")


def _title(cells: Sequence[Cell]) -> str:
    return "mIoU" if any(cell.miou for cell in cells) else "accuracy"


def _error(cell: Cell) -> float:
    return cell.result.sampling_error if cell.result.spread is None else cell.result.spread


def _meaning(cells: Sequence[Cell]) -> str:
    """Returns the meaning of the bars, for the axis label."""
    kinds = {cell.result.spread is None for cell in cells}
    over_images, over_runs = "s.e. over images", "s.d. over runs"
    if kinds == {True, False}:
        return f"bars: {over_runs} ({over_images} for a single run)"
    return f"bars: {over_images if kinds == {True} else over_runs}"
