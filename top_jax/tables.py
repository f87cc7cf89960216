"""Tables as text: aligned Markdown for a file or a terminal, and the rows of a measurement as such a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_PROBLEMS: Final = ("error", "absent")
_NOT_SHOWN: Final = (*_PROBLEMS, "rounds", "calls")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, padded so that it can be read unrendered.

    Args:
        columns: headings. The first column is aligned to the left, the others to the right.
        rows: the texts of each row, one per column.
    """
    heading, *body = aligned([columns, *rows], least=3)
    rule = ["-" * len(heading[0]), *(f"{'-' * (len(text) - 1)}:" for text in heading[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *body))


def aligned(lines: Sequence[Sequence[str]], least: int = 0) -> list[list[str]]:
    """Pads texts to columns of at least `least` characters: the first aligned to the left, the others to the right."""
    widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))]
        for first, *rest in lines
    ]


def rows_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of a measurement as a Markdown table; a row without a result becomes a line below it.

    Args:
        rows: JSON values by column. `error` or `absent` gives the reason why a row has no result; `rounds` and `calls`
            are left out. Columns are in the order in which they first appear.
    """
    good = [row for row in rows if not any(name in row for name in _PROBLEMS)]
    columns = [key for key in dict.fromkeys(key for row in good for key in row) if key not in _NOT_SHOWN]
    parts = [markdown(columns, [[cell(row.get(key)) for key in columns] for row in good])] if columns else []
    for row in rows:
        for problem in (name for name in _PROBLEMS if name in row):
            known = " ".join(cell(value) for key, value in row.items() if key not in _NOT_SHOWN)
            parts.append(f"{known}: {problem}: {row[problem]}".removeprefix(": "))
    return "\n".join(parts)


def cell(value: Any) -> str:
    """Formats a JSON value as a table's cell: four digits, `-` for None, `a .. b` for a list."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return " .. ".join(cell(item) for item in value) if isinstance(value, list) else str(value)
