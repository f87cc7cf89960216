"""Output of commands: headings, lines and tables on stdout, and progress on stderr.

Progress needs a terminal and rich (the extra `train`); without either nothing is shown.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from top_jax.optional import installed
from top_jax.tables import aligned


class Table:
    """Rows of text in aligned columns: the first to the left, the others to the right.

    Args:
        *columns: headings.
    """

    def __init__(self, *columns: str):
        self._lines: list[tuple[tuple[str, ...], bool]] = [(columns, False)]

    def add_row(self, *cells: str, bold: bool = False) -> None:
        """Adds a row, of as many cells as the others."""
        self._lines.append((cells, bold))

    def show(self) -> None:
        """Prints the table."""
        lines = aligned([cells for cells, _ in self._lines])
        for cells, (_, bold) in zip(lines, self._lines, strict=True):
            line = "    ".join(cells).rstrip()
            print(f"  {_bold(line) if bold else line}")


def heading(text: str) -> None:
    """Prints a bold line after an empty one."""
    print(f"\n{_bold(text)}")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields the function that advances it by a count."""
    if not _can_show():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def status(what: str) -> Iterator[None]:
    """Shows the name of the work in progress, for work of unknown length."""
    if not _can_show():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def _can_show() -> bool:
    return sys.stderr.isatty() and installed("rich")


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
