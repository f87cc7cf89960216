"""The counts of multiply-accumulates as a person reads them."""

from __future__ import annotations

import itertools
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from top_jax.evaluation.flops.parts import PART_NAMES

_STEPS: Final = {
    "multiply_accumulates": "multiply-accumulates of the jaxpr, times two",
    "border_taps": "taps on a border's padding, not counted",
    "loop_trips": "loops, counted as if they ran once",
    "elementwise": "element by element: norms, gates, activations",
    "sums_and_sorts": "sums, extremes and sorts",
}


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
    """Parameters, and the executed count beside the others."""
    found = counts["cross_check"]
    _say(f"{counts['parameters']:,} parameters")
    counted, above = found["jaxpr"], found["jaxpr_above_executed"]
    of_scans = f", {counted['loops']:,} of scans, 4 of their 9 operations ({_verdict(above['scans'])})"
    _say(
        f"in the jaxpr of the model: {counted['products'] + counted['taps']:,} multiply-accumulates of products and "
        f"convolutions ({_verdict(above['without_scans'])}){of_scans if counted['loops'] or above['scans'] else ''}"
    )
    if found["xla"] is not None:
        _show_xla(found["xla"], found["platform"])


def _show_xla(xla: dict[str, Any], platform: str) -> None:
    _say(f"XLA's cost analysis of the program before it is optimised ({platform}):")
    table = _table("operations", "")
    for name, operations in xla["steps"].items():
        table.add_row(_STEPS[name], f"{operations:+,}")
    table.add_row("explained", f"{sum(xla['steps'].values()):,}")
    table.add_row("XLA", f"{xla['flops']:,}")
    table.add_row("not explained", f"{xla['unexplained']:+,} ({xla['unexplained'] / xla['flops']:+.3%})")
    _console().print(table)
    difference = xla["transcendentals"] - xla["expected_transcendentals"]
    explained = "as in the jaxpr" if difference == 0 else f"{difference:+,} beside the jaxpr's"
    _say(f"and {xla['transcendentals']:,} exponentials, logarithms and roots ({explained})")
    if xla["compiled_flops"] is not None:
        more = xla["compiled_flops"] / xla["flops"] - 1
        _say(f"of the optimised program: {xla['compiled_flops']:,} operations ({more:+.2%})")


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
    return "exactly as executed" if above == 0 else f"NOT as executed: {above:+,}"


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
