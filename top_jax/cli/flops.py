"""Counts the cost of a config's model: tokens per block, and multiply-accumulates per part, dense and reduced.

top-jax flops --config configs/vim_s_top.py [--json FILE]

The counts are for one image, in three conventions (docs/concepts/flops.md). The `executed` one is checked against the
multiplications in the model that JAX traces.
"""

from __future__ import annotations

import itertools
from typing import Any

from absl import flags

from top_jax import files
from top_jax.cli import runner, shared_flags, terminal

_CONFIG = shared_flags.define_config()
_JSON = flags.DEFINE_string("json", None, "File for the counts.")


def main(arguments: list[str]) -> None:
    """Counts, checks, prints and writes the costs."""
    from top_jax.evaluation.flops.of_config import CHECK_STEPS, check_config, count_config

    runner.no_more(arguments)
    runner.check_json(_JSON.value)
    config = shared_flags.read_config(_CONFIG)
    counts = count_config(config)
    _show_counts(counts)
    with terminal.progress(f"tracing {config.model.name}", CHECK_STEPS) as advance:
        counts |= check_config(config, on_step=advance)
    _show_check(counts)
    files.save_json(_JSON.value, counts)


def _show_counts(counts: dict[str, Any]) -> None:
    """Prints tokens per block, and the parts in every convention."""
    height, width = counts["img_size"]
    print(f"{counts['model']}, one image of {height} x {width}")
    start = 1
    for tokens, run in itertools.groupby(counts["tokens_per_block"]):
        end = start + len(list(run)) - 1
        blocks = f"block {start}" if start == end else f"blocks {start} to {end}"
        of_class = " (class token included)" if counts["class_token"] else ""
        print(f"  {blocks}: {tokens:,} tokens{of_class}")
        start = end + 1
    _parts_table(counts).show()


def _show_check(counts: dict[str, Any]) -> None:
    """Prints the parameters, and whether the `executed` count agrees with the traced model."""
    found = counts["cross_check"]
    print(f"{counts['parameters']:,} parameters")
    counted, above = found["jaxpr"], found["jaxpr_above_executed"]
    products = counted["products"] + counted["taps"]
    print(
        f"check against the traced model: {products:,} multiply-accumulates in products and convolutions "
        f"({_verdict(above['without_scans'])})"
    )
    if counted["loops"] or above["scans"]:
        print(
            f"  and {counted['loops']:,} multiplications in scans, 4 of their 9 operations ({_verdict(above['scans'])})"
        )


def _parts_table(counts: dict[str, Any]) -> terminal.Table:
    """Returns multiply-accumulates by part and convention, next to the dense model's if tokens are reduced."""
    from top_jax.evaluation.flops import PART_NAMES

    parts, dense = counts["parts"], counts["dense_parts"]
    totals, dense_totals = ({name: sum(of[name].values()) for name in of} for of in (parts, dense))
    reduced, unit = parts != dense, "G" if max(dense_totals.values()) >= 1e8 else "M"

    def cell(macs: int, of: int) -> str:
        return f"{_amount(macs, unit)} of {_amount(of, unit)}" if reduced and macs + of else _amount(macs, unit)

    table = terminal.Table(f"{unit}MACs", *(name.replace("_", " ") for name in parts))
    for part in PART_NAMES:
        if any(part in macs for macs in (*parts.values(), *dense.values())):
            table.add_row(part, *(cell(parts[name].get(part, 0), dense[name].get(part, 0)) for name in parts))
    if "backbone_gmacs" in counts:
        alone, dense_alone = (
            {name: round(1e9 * gmacs) for name, gmacs in counts[key].items()}
            for key in ("backbone_gmacs", "dense_backbone_gmacs")
        )
        table.add_row("backbone", *(cell(alone[name], dense_alone[name]) for name in parts), bold=True)
        if reduced:
            table.add_row("share of dense", *(f"{alone[name] / dense_alone[name]:.1%}" for name in parts))
    table.add_row("total", *(cell(totals[name], dense_totals[name]) for name in parts), bold=True)
    if reduced:
        table.add_row("share of dense", *(f"{totals[name] / dense_totals[name]:.1%}" for name in parts))
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


if __name__ == "__main__":
    runner.run(main)
