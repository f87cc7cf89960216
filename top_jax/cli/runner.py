"""What all commands share: the command line, JSON files, progress, and errors as one line. absl is all it loads."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from top_jax.errors import InputError, RunError


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the command line, calls `main(positional arguments)` and exits.

    Bad input is one line on stderr and status 2, a run that cannot go on one line and status 1. Anything else is a
    defect and keeps its traceback.
    """

    def guarded(arguments: list[str]) -> None:
        if not any(argument.lstrip("-").startswith(("verbosity", "v=")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)  # absl's INFO has Orbax tell every step of every save
        try:
            main(arguments[1:])
        except (InputError, RunError) as error:
            sys.exit(_report(error))
        except KeyboardInterrupt:
            sys.exit(130)  # as the shell says it; a training run saves first (top_jax.training.interruption)

    app.run(guarded, flags_parser=_parse)


def no_more(arguments: list[str]) -> None:
    """Refuses positional arguments that no one would read."""
    if arguments:
        raise InputError(f"unexpected argument {arguments[0]!r}; this command takes only flags (--help).")


def check_json(file: str | Path | None) -> None:
    """Refuses, before the work, a file that could not be written after it."""
    if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise InputError(f"--json={file} has no directory to be written in, or is one; choose another place.")


def write_json(file: str | Path | None, content: Any) -> None:
    """Writes a command's result where it was asked for, if it was."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); choose another with --json.") from error


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields the function that moves it on."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _parse(arguments: list[str]) -> list[str]:
    if {"-h", "--help"} & set(arguments):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, OSError, SyntaxError) as error:
        lines = [line.strip() for line in str(error).replace("flag --config=None: ", "").strip().splitlines()]
        if any("Traceback" in line for line in lines):  # of the config file: its last line says what is wrong
            lines = [lines[0].removesuffix("Traceback (most recent call last):"), lines[-1].split("InputError: ")[-1]]
        sys.exit(_report(InputError(" ".join(lines))))
    except (AttributeError, KeyError) as error:
        sys.exit(_report(_unknown_key(arguments, str(error))))


def _unknown_key(arguments: list[str], reason: str) -> InputError:
    """ml_collections names only the last part of an unknown key: find the argument that has it."""
    names = re.findall(r"\w+", reason)
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if names and key.startswith("config.") and names[0] in key.split("."):
            meant = re.search(r'Did you mean "(\w+)"', reason)
            hint = f" (did you mean {meant[1]!r}?)" if meant else ""
            return InputError(
                f"{argument}: the config has no key {names[0]!r}{hint}; top_jax/config.py lists and explains all keys."
            )
    return InputError(f"the config file cannot be used: it raises an error for {reason}.")


def _report(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1
