"""What commands print: headings, lines and tables on stdout, and progress on stderr. rich is loaded when it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def heading(text: str) -> None:
    """Prints a bold line after an empty one."""
    _console().print(f"\n{text}", style="bold", highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints text as it is, however long its lines are."""
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def new_table(*columns: str) -> Table:
    """Returns an empty table without borders; the first column is aligned to the left, the others to the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=bool(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def show(table: Table) -> None:
    """Prints a table."""
    _console().print(table)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr if that is a terminal; yields the function that advances it by a count."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def status(what: str) -> Iterator[None]:
    """Shows on stderr, if that is a terminal, what is running, for work without a known length."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def _console() -> Console:
    """Returns a console on the present stdout, which tests replace."""
    from rich.console import Console

    return Console()
