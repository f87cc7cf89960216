"""The tables of an ablation, as markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from top_jax.ablation.results import Row, label, ratio_of, ratio_text
from top_jax.ablation.statistics import Cell, Comparison, Estimate, compare
from top_jax.pruning import WAYS
from top_jax.tables import markdown as markdown_table

CONVENTION: Final = "published"

HOW_TO_READ: Final = (
    "{title} and drop are in per cent, averaged over runs. `sd` is the standard deviation over runs (checkpoints, "
    "seeds of `random`, seeds of fine-tuning), `se` the standard error over images. The drop is measured from the "
    "dense model of the same checkpoint on the same images{task} Order `score` leaves the kept tokens in the order of "
    "their scores: with alignment `none`, this is the naive ViT way. `random` and `uniform` are controls."
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
    form = _form(tables)
    how = HOW_TO_READ.format(title=form.title, task=form.how_to_read)
    parts = [f"# Ablation of token pruning\n\n{about}\n\n{textwrap.fill(how, 120)}\n"]
    for table in tables:
        parts.append(f"## {table.title}\n\n{_grid(form.columns, table.cells)}\n")
        if table.reference is not None and (pairs := _pairs(table, rows)):
            parts.append(
                f"Compared with {name_of(table.reference)} on the same images{form.test}:\n\n"
                f"{_grid(form.pair_columns, pairs)}\n"
            )
    return "\n".join(parts)


def as_csv(tables: Iterable[Table]) -> str:
    """Returns all lines of all tables as one CSV; accuracies, mIoU and their errors are fractions."""
    tables = list(tables)
    columns = _form(tables).csv
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "finetune_steps", "learning_rate", *columns])
    for table in tables:
        for cell in table.cells:
            values = [value(cell) for value in columns.values()]
            writer.writerow([table.name, *(cell.finetuned or ("", "")), *values])
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


class _Form(NamedTuple):
    """Presentation of a task's results in tables: names, explanations and columns."""

    title: str
    how_to_read: str
    test: str
    columns: dict[str, Callable[[Cell], str]]
    pair_columns: dict[str, Callable[[Comparison], str]]
    csv: dict[str, Callable[[Cell], Any]]


def _form(tables: list[Table]) -> _Form:
    return _SEGMENTS if any(cell.miou for table in tables for cell in table.cells) else _CLASSIFIES


def _gmacs(of: Callable[[Cell], dict[str, float]]) -> Callable[[Cell], str]:
    return lambda cell: f"{of(cell)[CONVENTION]:.3g}"


def _in_csv(name: str, of: Callable[[Cell], Estimate | None]) -> dict[str, Callable[[Cell], Any]]:
    """Returns the columns of an estimate; empty where there is none."""
    parts = {name: "mean", f"{name}_sd": "spread", f"{name}_se": "sampling_error"}
    return {column: lambda cell, part=part: _known(getattr(of(cell), part, None)) for column, part in parts.items()}


def _known(value: Any) -> Any:
    return "" if value is None else value


_SETTING: Final[dict[str, Callable[[Cell], str]]] = {
    "alignment": lambda cell: cell.alignment or "dense",
    "order": lambda cell: cell.order or "-",
    "score": lambda cell: cell.score or "-",
    "keep": lambda cell: ratio_text(cell.keep_ratio),
}
_DROP: Final[dict[str, Callable[[Cell], str]]] = {"drop": lambda cell: _percent(cell.drop)}
_COUNTS: Final[dict[str, Callable[[Cell], str]]] = {
    "runs (checkpoints)": lambda cell: f"{cell.runs} ({cell.checkpoints})",
    "images": lambda cell: f"{cell.images}",
}
_PAIR: Final[dict[str, Callable[[Comparison], str]]] = {
    "setting": lambda pair: name_of(pair.cell),
    "difference": lambda pair: _percent(pair.difference, signed=True),
}
_CSV_SETTING: Final[dict[str, Callable[[Cell], Any]]] = {
    "alignment": lambda cell: cell.alignment or "dense",
    "order": lambda cell: cell.order or "",
    "score": lambda cell: cell.score or "",
    "keep_ratio": lambda cell: ratio_text(cell.keep_ratio),
    "after_blocks": lambda cell: " ".join(map(str, cell.after_blocks)),
    "tokens_per_block": lambda cell: " ".join(map(str, cell.tokens_per_block)),
    "gmacs_published": lambda cell: cell.gmacs[CONVENTION],
}
_CSV_DROP: Final = _in_csv("drop", lambda cell: cell.drop)
_CSV_COUNTS: Final[dict[str, Callable[[Cell], Any]]] = {
    "runs": lambda cell: cell.runs,
    "checkpoints": lambda cell: cell.checkpoints,
    "images": lambda cell: cell.images,
}
_CLASSIFIES: Final = _Form(
    title="Accuracy",
    how_to_read="; `lost / gained` counts the images that only the dense or only the pruned model classifies "
    f"correctly, over all runs. GMACs are per image ({CONVENTION} convention).",
    test=" (p: McNemar's exact test, for a single pair of runs)",
    columns={
        **_SETTING,
        "tokens": _tokens,
        "GMACs": _gmacs(lambda cell: cell.gmacs),
        "accuracy": lambda cell: _percent(cell.accuracy),
        **_DROP,
        "lost / gained": lambda cell: "-" if cell.drop is None else f"{cell.lost} / {cell.gained}",
        **_COUNTS,
    },
    pair_columns={
        **_PAIR,
        "only this right": lambda pair: f"{pair.only_this}",
        "only the other right": lambda pair: f"{pair.only_reference}",
        "pairs of runs": lambda pair: f"{pair.pairs}",
        "p": _p_value,
    },
    csv={
        **_CSV_SETTING,
        **_in_csv("accuracy", lambda cell: cell.accuracy),
        **_CSV_DROP,
        "lost": lambda cell: "" if cell.drop is None else cell.lost,
        "gained": lambda cell: "" if cell.drop is None else cell.gained,
        **_CSV_COUNTS,
    },
)
_SEGMENTS: Final = _Form(
    title="mIoU",
    how_to_read=". The mIoU is no mean over images: its `se` is that of its linear approximation, and no image is lost "
    f"or gained. Pixels are the labelled ones that are right, in per cent. GMACs are per crop ({CONVENTION} "
    "convention): of the backbone, which is pruned, and with neck and heads, which are not. Fill is what stands in a "
    "map for a dropped token.",
    test="",
    columns={
        **_SETTING,
        "fill": lambda cell: cell.fill or "-",
        "tokens": _tokens,
        "backbone GMACs": _gmacs(lambda cell: cell.pruned_gmacs),
        "total GMACs": _gmacs(lambda cell: cell.gmacs),
        "mIoU": lambda cell: _percent(cell.miou),
        **_DROP,
        "pixels": lambda cell: f"{100 * (cell.pixel_accuracy or 0):.2f}",
        **_COUNTS,
    },
    pair_columns={**_PAIR, "pairs of runs": lambda pair: f"{pair.pairs}"},
    csv={
        **_CSV_SETTING,
        "fill": lambda cell: cell.fill or "",
        "backbone_gmacs_published": lambda cell: cell.pruned_gmacs[CONVENTION],
        **_in_csv("miou", lambda cell: cell.miou),
        **_CSV_DROP,
        "pixel_accuracy": lambda cell: cell.pixel_accuracy,
        **_CSV_COUNTS,
    },
)
