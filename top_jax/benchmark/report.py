"""Where and with what a report was made, its tables for a terminal, and its file, whole at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from top_jax.environment import environment
from top_jax.errors import InputError
from top_jax.files import write_json


def write_whole(file: Path, content: Any) -> None:
    """Writes JSON so that a kill at any moment leaves the old file or the new one.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        write_json(file, content)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); choose another file with --out.") from error


def publish(rows: list[dict[str, Any]], out: Path | None, **about: Any) -> None:
    """Prints rows as a table, and writes them with the machine, and what they are about, to `out`."""
    print(table(rows))
    if out is not None:
        write_whole(out, {"environment": environment(), **about, "rows": rows})


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns, with `error` or `absent` at the end of the line; how often was measured is left out."""
    problems, left_out = ("error", "absent"), ("rounds", "calls")
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in (*problems, *left_out)]
    if not keys:
        return ""
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    notes = ["", *(next((f"  {name}: {row[name]}" for name in problems if name in row), "") for row in rows)]
    lines = []
    for line, note in zip(cells, notes, strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append((text + note).rstrip())
    return "\n".join(lines)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Rows of texts as a Markdown table that is aligned to be read as it is; all but the first column to the right."""
    widths = [max(3, *(len(line[place]) for line in (columns, *rows))) for place in range(len(columns))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = []
    for line in (columns, rule, *rows):
        first, *rest = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        lines.append(f"| {' | '.join((first.strip().ljust(widths[0]), *rest))} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return " .. ".join(_cell(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
