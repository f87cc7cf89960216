"""The tables of an ablation, as markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from top_jax.ablation.results import Row, label, ratio_of, ratio_text
from top_jax.ablation.statistics import Cell, Comparison, Estimate, compare
from top_jax.pruning import WAYS
from top_jax.tables import markdown as markdown_table

CONVENTION: Final = "published"

HOW_TO_READ: Final = """\
Accuracy and drop are in per cent, averaged over runs. `sd` is the standard deviation over runs (checkpoints, seeds of
`random`, seeds of fine-tuning), `se` the standard error over images. The drop is measured from the dense model of the
same checkpoint on the same images; `lost / gained` counts the images that only the dense or only the pruned model
classifies correctly, over all runs. GMACs are per image ({convention} convention). Order `score` leaves the kept tokens
in the order of their scores: with alignment `none`, this is the naive ViT way. `random` and `uniform` are controls."""


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
        base: after_blocks, keep_ratio, alignment, order and score of the setting that all tables share.
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
    parts = [f"# Ablation of token pruning\n\n{about}\n\n{HOW_TO_READ.format(convention=CONVENTION)}\n"]
    for table in tables:
        parts.append(f"## {table.title}\n\n{_grid(_COLUMNS, table.cells)}\n")
        if table.reference is not None and (pairs := _pairs(table, rows)):
            parts.append(
                f"Compared with {name_of(table.reference)} on the same images (p: McNemar's exact test, for a single "
                f"pair of runs):\n\n{_grid(_PAIR_COLUMNS, pairs)}\n"
            )
    return "\n".join(parts)


def as_csv(tables: Iterable[Table]) -> str:
    """Returns all lines of all tables as one CSV; accuracies and their errors are fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["table", "finetune_steps", "learning_rate", *_SETTING, "after_blocks", "tokens_per_block"] + _NUMBERS
    )
    for table in tables:
        for cell in table.cells:
            writer.writerow([table.name, *(cell.finetuned or ("", "")), *_csv_cells(cell)])
    return text.getvalue()


def name_of(cell: Cell) -> str:
    """Returns a cell's setting in words, such as `hold, clip, keep 0.7`."""
    return label(dataclasses.asdict(cell))


def _of_one_training(training: tuple[int, float] | None, cells: list[Cell], base: dict[str, Any]) -> list[Table]:
    dense = [cell for cell in cells if cell.is_dense]
    pruned = [cell for cell in cells if not cell.is_dense]
    ratio = ratio_of(base)

    def at(**fixed: Any) -> list[Cell]:
        return [cell for cell in pruned if all(getattr(cell, name) == value for name, value in fixed.items())]

    way = {"alignment": base["alignment"], "order": base["order"]}
    crossing = at(keep_ratio=ratio, score=base["score"], **way)
    reference = crossing[0] if crossing else None
    found = {
        "alignment": ("Alignment", at(keep_ratio=ratio, score=base["score"])),
        "score": ("Score", at(keep_ratio=ratio, **way)),
        "keep_ratio": ("Keep ratio", sorted(at(score=base["score"]), key=_by_way_and_cost)),
    }
    covered = [cell for _, some in found.values() for cell in some]
    if len(pruned) > len({id(cell) for cell in covered}):
        found["all"] = ("All settings", sorted(pruned, key=_by_way_and_cost))
    suffix = "without training" if training is None else f"after {training[0]} steps at {training[1]:g}"
    return [
        Table(name, f"{title}, {suffix}", dense + some, reference if name in ("alignment", "score") else None)
        for name, (title, some) in found.items()
        if len({_varied(name, cell) for cell in some}) > 1
    ] or [Table("all", f"All settings, {suffix}", cells, None)]


def _varied(name: str, cell: Cell) -> Any:
    """Returns what a table varies; one in which nothing varies is left out."""
    varied = {"alignment": (cell.alignment, cell.order), "score": cell.score, "keep_ratio": cell.keep_ratio}
    return varied.get(name, cell.key)


def _by_way_and_cost(cell: Cell) -> Any:
    return WAYS.index((cell.alignment or "", cell.order or "")), cell.score, -cell.gmacs[CONVENTION]


def _pairs(table: Table, rows: list[Row]) -> list[Comparison]:
    reference = table.reference
    assert reference is not None
    others = (cell for cell in table.cells if cell is not reference and not cell.is_dense)
    return [pair for cell in others if (pair := compare(rows, cell, reference)) is not None]


def _grid(columns: dict[str, Callable[[Any], str]], lines: list[Any]) -> str:
    return markdown_table(list(columns), [[show(line) for show in columns.values()] for line in lines])


def _percent(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    spread = "" if value.spread is None else f" sd {100 * value.spread:.2f}"
    return f"{100 * value.mean:{'+' if signed else ''}.2f}{spread} se {100 * value.sampling_error:.2f}"


def _tokens(cell: Cell) -> str:
    return " > ".join(str(count) for count in dict.fromkeys(cell.tokens_per_block))


def _p_value(pair: Comparison) -> str:
    if pair.p_value is None:
        return "-"
    return "< 0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"


_COLUMNS: Final[dict[str, Callable[[Cell], str]]] = {
    "alignment": lambda cell: cell.alignment or "dense",
    "order": lambda cell: cell.order or "-",
    "score": lambda cell: cell.score or "-",
    "keep": lambda cell: ratio_text(cell.keep_ratio),
    "tokens": _tokens,
    "GMACs": lambda cell: f"{cell.gmacs[CONVENTION]:.3g}",
    "accuracy": lambda cell: _percent(cell.accuracy),
    "drop": lambda cell: _percent(cell.drop),
    "lost / gained": lambda cell: "-" if cell.drop is None else f"{cell.lost} / {cell.gained}",
    "runs (checkpoints)": lambda cell: f"{cell.runs} ({cell.checkpoints})",
    "images": lambda cell: f"{cell.images}",
}
_PAIR_COLUMNS: Final[dict[str, Callable[[Comparison], str]]] = {
    "setting": lambda pair: name_of(pair.cell),
    "difference": lambda pair: _percent(pair.difference, signed=True),
    "only this right": lambda pair: f"{pair.only_this}",
    "only the other right": lambda pair: f"{pair.only_reference}",
    "pairs of runs": lambda pair: f"{pair.pairs}",
    "p": _p_value,
}
_SETTING: Final = ["alignment", "order", "score", "keep_ratio"]
_NUMBERS: Final = [
    "gmacs_published",
    "accuracy",
    "accuracy_sd",
    "accuracy_se",
    "drop",
    "drop_sd",
    "drop_se",
    "lost",
    "gained",
    "runs",
    "checkpoints",
    "images",
]


def _csv_cells(cell: Cell) -> list[Any]:
    setting = [cell.alignment or "dense", cell.order or "", cell.score or "", ratio_text(cell.keep_ratio)]
    schedule = [" ".join(map(str, cell.after_blocks)), " ".join(map(str, cell.tokens_per_block))]
    accuracy, drop = (_csv_number(value) for value in (cell.accuracy, cell.drop))
    differing = ["", ""] if cell.drop is None else [cell.lost, cell.gained]
    counts = [*differing, cell.runs, cell.checkpoints, cell.images]
    return [*setting, *schedule, cell.gmacs[CONVENTION], *accuracy, *drop, *counts]


def _csv_number(value: Estimate | None) -> list[Any]:
    if value is None:
        return ["", "", ""]
    return [value.mean, "" if value.spread is None else value.spread, value.sampling_error]
