"""Runs a command: parses its flags, reports an error as one line, and writes its JSON. absl is all that it loads."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from top_jax import files
from top_jax.errors import InputError, RunError


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the command line, calls `main(positional arguments)` and exits.

    Bad input is one line on stderr and status 2, a run that cannot go on one line and status 1. Anything else is a
    bug and keeps its traceback.
    """

    def guarded(arguments: list[str]) -> None:
        if not any(argument.lstrip("-").startswith(("verbosity", "v=")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)  # at INFO, Orbax logs every step of every save
        try:
            main(arguments[1:])
        except (InputError, RunError) as error:
            sys.exit(_report(error))
        except KeyboardInterrupt:
            sys.exit(130)  # the shell's status; a training run saves first (top_jax.training.interruption)

    app.run(guarded, flags_parser=_parse)


def no_more(arguments: list[str]) -> None:
    """Raises InputError if there are positional arguments."""
    if arguments:
        raise InputError(f"unexpected argument {arguments[0]!r}; this command takes only flags (--help).")


def check_json(file: str | Path | None) -> None:
    """Raises InputError for a JSON file that could not be written, before the work that would be lost."""
    if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise InputError(f"--json={file} is a directory, or is in one that does not exist; choose another place.")


def write_json(file: str | Path | None, content: Any) -> None:
    """Writes a command's result to `file`, unless that is None.

    Raises:
        InputError: the file cannot be written.
    """
    if file is None:
        return
    try:
        files.write_json(file, content)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); choose another with --json.") from error


def _parse(arguments: list[str]) -> list[str]:
    if {"-h", "--help"} & set(arguments):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, OSError, SyntaxError) as error:
        lines = [line.strip() for line in str(error).replace("flag --config=None: ", "").strip().splitlines()]
        if any(
            "Traceback" in line for line in lines
        ):  # an error in the config file, whose last line says what is wrong
            lines = [lines[0].removesuffix("Traceback (most recent call last):"), lines[-1].split("InputError: ")[-1]]
        sys.exit(_report(InputError(" ".join(lines))))
    except (AttributeError, KeyError) as error:
        sys.exit(_report(_unknown_key(arguments, str(error))))


def _unknown_key(arguments: list[str], reason: str) -> InputError:
    """Names the argument with the unknown key; ml_collections gives only the last part of the key."""
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
