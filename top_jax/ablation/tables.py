"""The tables of an ablation, as markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import textwrap
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from top_jax.ablation.results import Row, label, ratio_of, ratio_text
from top_jax.ablation.statistics import Cell, Comparison, Estimate, compare
from top_jax.pruning import WAYS
from top_jax.tables import rows_as_text

CONVENTION: Final = "published"

HOW_TO_READ: Final = (
    "{title} and drop are in per cent, averaged over runs. `sd` is the standard deviation over runs (checkpoints, "
    "seeds of `random`, seeds of fine-tuning), `se` the standard error over images. The drop is measured from the "
    "dense model of the same checkpoint on the same images{task} Order `score` leaves the kept tokens in the order of "
    "their scores: with alignment `none`, this is the naive ViT way. `random` and `uniform` are controls."
)


# Name of the result, the rest of the sentence on the drop, and the test of a comparison.
_OF_CLASSIFIERS: Final = (
    "Accuracy",
    "; `lost / gained` counts the images that only the dense or only the pruned model classifies correctly, over all "
    f"runs. GMACs are per image ({CONVENTION} convention).",
    " (p: McNemar's exact test, for a single pair of runs)",
)
_OF_SEGMENTERS: Final = (
    "mIoU",
    ". The mIoU is no mean over images: its `se` is that of its linear approximation, and no image is lost or gained. "
    f"Pixels are the labelled ones that are right, in per cent. GMACs are per crop ({CONVENTION} convention): of the "
    "backbone, which is pruned, and with neck and heads, which are not. Fill is what stands in a map for a dropped "
    "token.",
    "",
)


class Table(NamedTuple):
    """One table: cells in the order of its lines.

    Attributes:
        name: one of `top_jax.ablation.TABLES`, or `all`.
        title: heading of its section.
        cells: the lines, the dense model first.
        reference: the setting that the others are compared with; None for a table without comparisons.
    """

    name: str
    title: str
    cells: list[Cell]
    reference: Cell | None


def arrange(cells: Iterable[Cell], base: dict[str, Any]) -> list[Table]:
    """Returns the tables that the cells suffice for; if a cell fits into none, the table `all` holds every cell.

    Args:
        cells: from `summarise`.
        base: after_blocks, keep_ratio, alignment, order, score and fill of the setting that all tables share.
    """
    by_training: dict[Any, list[Cell]] = {}
    for cell in cells:
        by_training.setdefault(cell.finetuned, []).append(cell)
    return [table for training, some in by_training.items() for table in _of_one_training(training, some, base)]


def markdown(tables: Iterable[Table], rows: list[Row], about: str) -> str:
    """Returns all tables as one markdown document that explains its numbers.

    Args:
        tables: from `arrange`.
        rows: the rows that their cells were made from.
        about: a paragraph on models, data and machine.
    """
    tables = list(tables)
    segments = any(cell.miou for table in tables for cell in table.cells)
    title, task, test = _OF_SEGMENTERS if segments else _OF_CLASSIFIERS
    how = HOW_TO_READ.format(title=title, task=task)
    parts = [f"# Ablation of token pruning\n\n{about}\n\n{textwrap.fill(how, 120)}\n"]
    for table in tables:
        parts.append(f"## {table.title}\n\n{rows_as_text([_line(cell) for cell in table.cells])}\n")
        if table.reference is not None and (pairs := _pairs(table, table.reference, rows)):
            parts.append(
                f"Compared with {name_of(table.reference)} on the same images{test}:\n\n"
                f"{rows_as_text([_pair_line(pair) for pair in pairs])}\n"
            )
    return "\n".join(parts)


def as_csv(tables: Iterable[Table]) -> str:
    """Returns all lines of all tables as one CSV; accuracies, mIoU and their errors are fractions."""
    lines = [_csv_line(table.name, cell) for table in tables for cell in table.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def name_of(cell: Cell) -> str:
    """Returns a cell's setting in words, such as `hold, clip, keep 0.7`; for a segmenter also the fill."""
    return label(dataclasses.asdict(cell))


def _of_one_training(training: tuple[int, float] | None, cells: list[Cell], base: dict[str, Any]) -> list[Table]:
    dense = [cell for cell in cells if cell.is_dense]
    pruned = [cell for cell in cells if not cell.is_dense]
    ratio, fill = ratio_of(base), {"fill": base.get("fill")}

    def at(**fixed: Any) -> list[Cell]:
        return [cell for cell in pruned if all(getattr(cell, name) == value for name, value in fixed.items())]

    way = {"alignment": base["alignment"], "order": base["order"]}
    crossing = at(keep_ratio=ratio, score=base["score"], **way, **fill)
    reference = crossing[0] if crossing else None
    found = {
        "alignment": ("Alignment", at(keep_ratio=ratio, score=base["score"], **fill)),
        "score": ("Score", at(keep_ratio=ratio, **way, **fill)),
        "keep_ratio": ("Keep ratio", sorted(at(score=base["score"], **fill), key=_by_way_and_cost)),
        "fill": ("Fill", at(keep_ratio=ratio, score=base["score"], **way)),
    }
    covered = [cell for _, some in found.values() for cell in some]
    if len(pruned) > len({id(cell) for cell in covered}):
        found["all"] = ("All settings", sorted(pruned, key=_by_way_and_cost))
    suffix = "without training" if training is None else f"after {training[0]} steps at {training[1]:g}"
    return [
        Table(name, f"{title}, {suffix}", dense + some, None if name in ("keep_ratio", "all") else reference)
        for name, (title, some) in found.items()
        if len({_varied(name, cell) for cell in some}) > 1
    ] or [Table("all", f"All settings, {suffix}", cells, None)]


def _varied(name: str, cell: Cell) -> Any:
    """Returns the settings that a table varies; a table in which nothing varies is left out."""
    if name == "alignment":
        return cell.alignment, cell.order
    return cell.key if name == "all" else getattr(cell, name)


def _by_way_and_cost(cell: Cell) -> Any:
    return WAYS.index((cell.alignment or "", cell.order or "")), cell.score, -cell.gmacs[CONVENTION], cell.fill


def _pairs(table: Table, reference: Cell, rows: list[Row]) -> list[Comparison]:
    others = (cell for cell in table.cells if cell is not reference and not cell.is_dense)
    return [pair for cell in others if (pair := compare(rows, cell, reference)) is not None]


def _line(cell: Cell) -> dict[str, str]:
    """Returns a cell as a line of a markdown table, by column."""
    tokens = " > ".join(str(count) for count in dict.fromkeys(cell.tokens_per_block))
    line = {
        "alignment": cell.alignment or "dense",
        "order": cell.order or "-",
        "score": cell.score or "-",
        "keep": ratio_text(cell.keep_ratio),
    }
    if cell.miou is None:
        line |= {
            "tokens": tokens,
            "GMACs": f"{cell.gmacs[CONVENTION]:.3g}",
            "accuracy": _percent(cell.accuracy),
            "drop": _percent(cell.drop),
            "lost / gained": "-" if cell.drop is None else f"{cell.lost} / {cell.gained}",
        }
    else:
        line |= {
            "fill": cell.fill or "-",
            "tokens": tokens,
            "backbone GMACs": f"{cell.pruned_gmacs[CONVENTION]:.3g}",
            "total GMACs": f"{cell.gmacs[CONVENTION]:.3g}",
            "mIoU": _percent(cell.miou),
            "drop": _percent(cell.drop),
            "pixels": f"{100 * (cell.pixel_accuracy or 0):.2f}",
        }
    return {**line, "runs (checkpoints)": f"{cell.runs} ({cell.checkpoints})", "images": f"{cell.images}"}


def _pair_line(pair: Comparison) -> dict[str, str]:
    """Returns a comparison as a line of a markdown table, by column."""
    line = {"setting": name_of(pair.cell), "difference": _percent(pair.difference, signed=True)}
    if pair.cell.miou is not None:
        return {**line, "pairs of runs": f"{pair.pairs}"}
    if pair.p_value is None:
        p_value = "-"
    else:
        p_value = "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"
    counts = {"only this right": f"{pair.only_this}", "only the other right": f"{pair.only_reference}"}
    return {**line, **counts, "pairs of runs": f"{pair.pairs}", "p": p_value}


def _csv_line(table: str, cell: Cell) -> dict[str, Any]:
    """Returns a cell as a line of the CSV, by column; None is an empty field."""
    steps, learning_rate = cell.finetuned or (None, None)
    line = {
        "table": table,
        "finetune_steps": steps,
        "learning_rate": learning_rate,
        "alignment": cell.alignment or "dense",
        "order": cell.order,
        "score": cell.score,
        "keep_ratio": ratio_text(cell.keep_ratio),
        "after_blocks": " ".join(map(str, cell.after_blocks)),
        "tokens_per_block": " ".join(map(str, cell.tokens_per_block)),
        "gmacs_published": cell.gmacs[CONVENTION],
    }
    drop = _csv_estimate("drop", cell.drop)
    if cell.miou is None:
        counts = (None, None) if cell.drop is None else (cell.lost, cell.gained)
        line |= {**_csv_estimate("accuracy", cell.accuracy), **drop, "lost": counts[0], "gained": counts[1]}
    else:
        line |= {"fill": cell.fill, "backbone_gmacs_published": cell.pruned_gmacs[CONVENTION]}
        line |= {**_csv_estimate("miou", cell.miou), **drop, "pixel_accuracy": cell.pixel_accuracy}
    return {**line, "runs": cell.runs, "checkpoints": cell.checkpoints, "images": cell.images}


def _csv_estimate(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    parts = (None, None, None) if estimate is None else (estimate.mean, estimate.spread, estimate.sampling_error)
    return dict(zip((name, f"{name}_sd", f"{name}_se"), parts, strict=True))


def _percent(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    spread = "" if value.spread is None else f" sd {100 * value.spread:.2f}"
    return f"{100 * value.mean:{'+' if signed else ''}.2f}{spread} se {100 * value.sampling_error:.2f}"
