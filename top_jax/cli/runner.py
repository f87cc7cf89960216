"""Runs a command: parses its flags, reports an error as one line, and writes its JSON. Imports only absl."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import io
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags, logging

from top_jax import files
from top_jax.errors import InputError, RunError, write_last_line
from top_jax.optional import missing_extra

# Errors about the user's path or disk, wherever they are raised.
_OF_THE_PLACE = frozenset(
    (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS)
)


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the command line, calls `main(positional arguments)` and exits.

    Bad input ends in one line on stderr and status 2; a run that cannot continue ends in one line and status 1. Any
    other error is a bug and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file and class names may hold any bytes; a terminal may be ASCII
        sys.stdout.reconfigure(errors="backslashreplace")

    def guarded(arguments: list[str]) -> None:
        if not any(argument.lstrip("-").startswith(("verbosity", "v=")) for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)  # at INFO, Orbax logs every step of every save
        _ended.clear()
        signal.signal(signal.SIGINT, _interrupt)
        before, sys.unraisablehook = sys.unraisablehook, functools.partial(_unraisable, sys.unraisablehook)
        try:
            main(arguments[1:])
            _ended.append(0)
        except KeyboardInterrupt:
            _leave(130)  # the shell's status; a training run saves first (top_jax.training.interruption)
        except Exception as error:
            problem = _problem(error)
            if problem is not None:
                _leave(_report(problem), error)
            if not _several():
                raise
            traceback.print_exc()
            _leave(1, error)
        finally:
            sys.unraisablehook = before

    app.run(guarded, flags_parser=_parse)


_ended: list[int] = []  # the exit status, once it is known


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: the first unwinds the command; a later one ends the process at once.

    A handler that was installed since (`top_jax.training.interruption`) takes the first Ctrl-C and passes on the
    second, which therefore ends the process too. Raising would happen inside Orbax, which prints the traceback.
    """
    if _ended or signal.getsignal(signal.SIGINT) is not _interrupt:
        if not _ended or _ended == [130]:
            write_last_line("interrupted again: ended at once; what was complete before is kept.")
        os._exit(_ended[0] if _ended else 130)
    _ended.append(130)
    raise KeyboardInterrupt


def _unraisable(hook: Callable[[Any], object], found: Any) -> None:
    """Repeats a Ctrl-C that Python dropped because it came during a garbage-collector callback, such as JAX's."""
    if not isinstance(found.exc_value, KeyboardInterrupt):
        hook(found)
        return
    _ended.clear()
    again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def _leave(status: int, error: Exception | None = None) -> NoReturn:
    _ended.append(status)
    several = _several()
    if several or isinstance(error, RunError) and error.at_once:
        from top_jax import distributed

        distributed.leave(status, wait=several and not isinstance(error, distributed.ProcessLost))
    sys.exit(status)


def _several() -> bool:
    """Whether this process has joined others (`top_jax.distributed.initialize`)."""
    if "top_jax.distributed" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _problem(error: Exception) -> Exception | None:
    """Returns the error to report as one line; None for a bug."""
    if isinstance(error, (InputError, RunError)):
        return error
    if isinstance(error, ImportError):
        return missing_extra(error, Path(sys.argv[0]).stem)
    if isinstance(error, BrokenPipeError):  # `| head`
        _drop_output()
        return RunError("the program that read this output has ended, so that nothing more can be printed.")
    if files.is_full(error):
        name = getattr(error, "filename", None)
        where = f"{name} was not written" if name else "this write failed"
        return RunError(f"the disk is full: {where}. Make room, and start the same command again.")
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_PLACE:
        return InputError(f"{error.filename}: {error.strerror}; choose another path.")
    if _several():
        from top_jax import distributed

        if (lost := distributed.lost_process(error)) is not None:
            return lost
    return _no_device()  # without a device, JAX, Flax and Orbax raise different errors at different points


def _drop_output() -> None:
    """Redirects stdout to the null device: at exit, Python would flush the rest to a reader that has ended."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_more(arguments: list[str]) -> None:
    """Raises InputError if there are positional arguments."""
    if arguments:
        raise InputError(f"unexpected argument {arguments[0]!r}; this command takes only flags (--help).")


def check_json(file: str | Path | None, *others: Path) -> None:
    """Raises InputError if the JSON file cannot be written, before any work that would be lost.

    Args:
        file: the JSON file; None is fine.
        *others: files that the command reads or writes, which the JSON must not replace.
    """
    if not file:
        return
    path = Path(file)
    problem = None
    try:
        if path.absolute() in {other.absolute() for other in others}:
            problem = "is another file of this command"
        elif path.is_dir() or not path.absolute().parent.is_dir():
            problem = "is a directory, or is in one that does not exist"
        elif path.exists() and not path.is_file():
            problem = "is a device or a pipe"
        else:
            files.check_writable(path)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if problem:
        raise InputError(f"--json={file} {problem}; choose another path.")


def _parse(arguments: list[str]) -> list[str]:
    if {"-h", "--help"} & set(arguments):
        from top_jax.cli import usage

        try:
            print(usage.help_text(with_settings=Path(sys.argv[0]).stem == "train"), flush=True)
        except BrokenPipeError:
            _drop_output()  # such as `--help | head`
        sys.exit(0)
    try:
        arguments = _with_flag_files(arguments)
        given = _given_flags(arguments)
        if _takes_config():
            from top_jax.cli import config_file

            arguments = config_file.with_config(arguments)
        logging.set_verbosity(logging.ERROR)  # ml_collections warns of what is an error here
        rest = flags.FLAGS(arguments)
        _check_values(given)
        return rest
    except InputError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except (Exception, SystemExit) as error:  # a config file may raise anything
        sys.exit(_report(_parse_error(arguments, error)))


def _with_flag_files(arguments: list[str]) -> list[str]:
    """Returns the command line with the flags of each --flagfile=FILE in its place."""
    try:
        return flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
    except (flags.Error, ValueError) as error:  # ValueError: it is not text
        raise InputError(f"--flagfile cannot be read: {str(error).rpartition('] ')[2]}") from error


def _takes_config() -> bool:
    """Whether the command has --config."""
    return "config" in flags.FLAGS and "top_jax.cli.shared_flags" in sys.modules


def _given_flags(arguments: Sequence[str]) -> list[str]:
    """Returns the names of the flags on the command line.

    Raises:
        InputError: a flag that takes one value is given twice; absl would use the last.
    """
    given: list[str] = []
    for argument in arguments[1:]:
        if argument == "--":
            break
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-"):
            continue
        if name not in flags.FLAGS and name.startswith("no"):
            name = name.removeprefix("no")
        if name not in flags.FLAGS and not name.startswith("config."):
            continue
        several = name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)
        if name in given and not several:
            raise InputError(f"--{name} is given more than once; keep only one of them.")
        given.append(name)
    return given


def _check_values(given: Sequence[str]) -> None:
    """Raises InputError for an empty value, or a number that is not finite (absl's bounds accept NaN)."""
    for name in given:
        value = flags.FLAGS[name].value if name in flags.FLAGS else None
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) and not item.strip():
                raise InputError(f"--{name} is empty, or has an empty part; give it a value, or leave it out.")
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"--{name}={item}; it must be a finite number.")


def _parse_error(arguments: list[str], error: BaseException) -> InputError:
    """Returns the error for a command line that cannot be parsed, or for its config file."""
    if _takes_config():
        from top_jax.cli import config_file

        if (problem := config_file.config_error(error)) is not None:
            return problem
        if (file := config_file.config_source()) and "Flag --config must" in str(error):
            return InputError(f"config file {file} returns None from get_config(); return make_config(...).")
    if isinstance(error, (AttributeError, KeyError)):
        return _unknown_key(arguments, str(error))
    text = str(error)
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return InputError(f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help}")
    if isinstance(error, flags.UnrecognizedFlagError):
        name, meant = error.flagname.lstrip("-"), re.search(r"Did you mean: (.*?) \?", text)
        hint = f"; did you mean --{meant[1].replace(', ', ' or --')}?" if meant else "; --help lists them."
        section, dot, key = name.partition(".")
        if dot and _takes_config() and difflib.get_close_matches(section, ["config"]):
            hint = f"; did you mean --config.{key}?"
        return InputError(f"--{name} is not a flag of this command{hint}")
    if novalue := re.match(r"Missing value for flag --?([\w.]+)", text):
        return InputError(f"--{novalue[1]} needs a value: --{novalue[1]}=VALUE.")
    if key := re.match(r"Could not parse '(.*?)'", text):
        return InputError(f"--config.{key[1]} is not a setting; top_jax/config.py lists and explains all keys.")
    return _wrong_value(text) or InputError(text or type(error).__name__)


def _wrong_value(text: str) -> InputError | None:
    """Returns the error for a flag's value, given the message of absl or ml_collections; None for other messages."""
    found = re.match(
        r"flag --([\w.]+)=(.*?): (invalid literal|could not|\('Non-boolean|value should|\S+ is not|Failed|Error while)",
        text,
    )
    if found is None or found[1] not in flags.FLAGS:
        return None
    name, value, reason = found.groups()
    parser: Any = flags.FLAGS[name].parser
    needed = {"int": "a whole number", "float": "a number", "bool": "True or False"}.get(parser.flag_type())
    if parser.flag_type() == "string enum":
        needed = f"one of {', '.join(parser.enum_values)}"
    elif reason == "Failed":  # a value is assigned to a whole section
        needed = f"one of its settings, as --{name}.KEY=VALUE"
    elif reason == "Error while":
        needed = f"a value, or several in quotes, as --{name}='(1, 2)'"
    for bound, word in (("lower_bound", "at least"), ("upper_bound", "at most")):
        if getattr(parser, bound, None) is not None:
            needed = f"{needed}, {word} {getattr(parser, bound)}"
    return None if needed is None else InputError(f"--{name}={value}; needed: {needed}.")


def _no_device() -> InputError | None:
    """Returns the error for a machine on which JAX finds no device; None if it finds one."""
    if "jax" not in sys.modules:
        return None
    from top_jax.ops.implementations import device

    try:
        device()
    except InputError as error:
        return error
    return None


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
