"""The counts of multiply-accumulates as a person reads them."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from top_jax.evaluation.flops import PART_NAMES


def show_counts(counts: dict[str, Any]) -> None:
    """Tokens per block, and parts in every convention."""
    _say(f"{counts['model']}, one image")
    start = 1
    for tokens, run in itertools.groupby(counts["tokens_per_block"]):
        end = start + len(list(run)) - 1
        blocks = f"block {start}" if start == end else f"blocks {start} to {end}"
        of_class = " (class token included)" if counts["class_token"] else ""
        _say(f"  {blocks}: {tokens:,} tokens{of_class}")
        start = end + 1
    _console().print(_parts_table(counts))


def show_check(counts: dict[str, Any]) -> None:
    """Prints the parameters, and whether the `executed` count is what the traced model does."""
    found = counts["cross_check"]
    _say(f"{counts['parameters']:,} parameters")
    counted, above = found["jaxpr"], found["jaxpr_above_executed"]
    products = counted["products"] + counted["taps"]
    _say(
        f"check against the traced model: {products:,} multiply-accumulates in products and convolutions "
        f"({_verdict(above['without_scans'])})"
    )
    if counted["loops"] or above["scans"]:
        _say(
            f"  and {counted['loops']:,} multiplications in scans, 4 of their 9 operations ({_verdict(above['scans'])})"
        )


def _parts_table(counts: dict[str, Any]) -> Table:
    """Multiply-accumulates by part and convention; beside them the dense model's, where tokens are reduced."""
    parts, dense = counts["parts"], counts["dense_parts"]
    totals, dense_totals = ({name: sum(of[name].values()) for name in of} for of in (parts, dense))
    reduced, unit = parts != dense, "G" if max(dense_totals.values()) >= 1e8 else "M"

    def cell(macs: int, of: int) -> str:
        return f"{_amount(macs, unit)} of {_amount(of, unit)}" if reduced and macs + of else _amount(macs, unit)

    table = _table(f"{unit}MACs", *(name.replace("_", " ") for name in parts))
    for part in PART_NAMES:
        if any(part in macs for macs in (*parts.values(), *dense.values())):
            table.add_row(part, *(cell(parts[name].get(part, 0), dense[name].get(part, 0)) for name in parts))
    table.add_row("total", *(cell(totals[name], dense_totals[name]) for name in parts), style="bold")
    if reduced:
        table.add_row("of the dense", *(f"{totals[name] / dense_totals[name]:.1%}" for name in parts))
    return table


def _amount(macs: int, unit: str) -> str:
    if macs == 0:
        return "-"
    amount = macs / {"G": 1e9, "M": 1e6}[unit]
    if amount < 0.001:
        return "<.001"
    return f"{amount:.2f}" if amount >= 1 else f"{amount:.3f}"


def _verdict(above: int) -> str:
    return "equal to the executed count" if above == 0 else f"DIFFERENT from the executed count: {above:+,}"


def _say(text: str) -> None:
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _console() -> Console:
    """Made anew for each use, because the tests put another stdout in its place."""
    return Console()
