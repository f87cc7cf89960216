"""The config file on the command line: the file that --config names, and the errors in it.

ml_collections (the extra `train`) is needed for config files and --config.key; a run's own config is read without it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import top_jax
from top_jax.errors import InputError
from top_jax.optional import optional_package

CONFIG_HELP = (
    "Run config: the name of one that comes with top-jax, such as vim_digits_top, a Python file with get_config(), or "
    "a run directory. By default that of the run in --checkpoint or --workdir, if the command has such a flag."
)
COMMAND_LINE: list[str] = []  # where ml_collections looks for --config.key; `with_config` fills it
RUN_CONFIG = str(Path(__file__).with_name("run_config.py"))  # what --config=RUN becomes: run_config.py:RUN
CHECKPOINT_HELP = (
    "Run directory, official .pth or .safetensors file, Hugging Face folder with one, or a name: pretrained:vim_small, "
    "hf://OWNER/REPO/FILE."
)


def config_flags(purpose: str = "--config") -> Any:
    """Returns the module ml_collections.config_flags, or raises InputError for `purpose`."""
    return optional_package("ml_collections.config_flags", purpose=purpose)


def with_config(arguments: list[str]) -> list[str]:
    """Returns the command line as ml_collections needs it: `--config=FILE.py` first.

    A run directory, or its config.json, becomes the Python file that reads it. Without --config, the run in
    --checkpoint or --workdir is taken.

    Raises:
        InputError: --config does not name a config, a --config.key is given without --config, or ml_collections is
            needed and not installed.
    """
    COMMAND_LINE[:] = arguments
    name, rest = _take(arguments, "config")
    keys = [argument for argument in arguments[1:] if re.match("--?(no)?config[.]", argument)]
    if name is None:
        name = _run_of(arguments)
    if name is None:
        if keys:
            raise InputError(f"{keys[0]} needs --config=NAME: {CONFIG_HELP}")
        return arguments
    file = _config_file(name)
    if keys or not file.startswith(f"{RUN_CONFIG}:"):
        config_flags(keys[0] if keys else f"--config={name}")  # raises if it is missing
    COMMAND_LINE[:] = [rest[0], f"--config={file}", *rest[1:]]
    return list(COMMAND_LINE)


def _take(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Returns the first value of a flag of a command line that is not parsed yet (or None), and the rest without it."""
    for place, argument in enumerate(arguments[1:], start=1):
        if argument == "--":
            break
        name, separator, value = argument.partition("=")
        if name in (f"-{flag}", f"--{flag}"):
            end = place + (1 if separator else 2)
            return value if separator else "".join(arguments[place + 1 : end]), [*arguments[:place], *arguments[end:]]
    return None, list(arguments)


def _run_of(arguments: list[str]) -> str | None:
    """Returns the run directory that the command reads, if it reads one."""
    checkpoint, workdir = (_take(arguments, flag)[0] for flag in ("checkpoint", "workdir"))
    if checkpoint and "checkpoint" in flags.FLAGS:
        from top_jax.convert.hub import is_name
        from top_jax.training.saved_weights import is_run

        if is_run(checkpoint):
            return checkpoint
        if not is_name(checkpoint) and not Path(checkpoint).exists():
            raise InputError(
                f"checkpoint {checkpoint} does not exist; pass a {CHECKPOINT_HELP[0].lower()}{CHECKPOINT_HELP[1:]}"
            )
        raise InputError(f"--config is needed: {checkpoint} is not a run, so its config is not known. {CONFIG_HELP}")
    if workdir and "workdir" in flags.FLAGS and (Path(workdir) / "config.json").is_file():
        return workdir
    return None


def _config_file(name: str) -> str:
    """Returns the Python file of a config, with its argument after a colon, as ml_collections reads it.

    Raises:
        InputError: there is no such file or run, or it is a file of another kind.
    """
    path = Path(name)
    plain, separator, argument = name.partition(":")
    named = shipped_configs().get(plain)
    if named is not None and not (path / "config.json").is_file():
        return f"{named}{separator}{argument}"
    if path.is_dir() or (path.name == "config.json" and path.parent.is_dir()):
        from top_jax.training.run_directory import RunDirectory

        run = path if path.is_dir() else path.parent
        RunDirectory(run).read_config()  # raises a plain InputError; ml_collections would wrap it
        return f"{RUN_CONFIG}:{run}"
    file = Path(plain)
    such = "pass a name such as vim_digits_top, a Python file with get_config(), or a run directory."
    if not file.is_file():
        raise InputError(_no_such_config(file, such))
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {file} cannot be read ({error}); {such}") from error
    if file.suffix != ".py" or not re.search(r"\bget_config\b", text):  # running such a file could do anything
        raise InputError(f"config file {file} is not a Python file with get_config(); {such}")
    return name


def shipped_configs() -> dict[str, Path]:
    """Returns the files of the configs that come with top-jax, by name: `configs/`, in the package if installed."""
    package = Path(top_jax.__file__).parent
    # Next to the package: a checkout whose link top_jax/configs was written out as a text file.
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py"))}


def _no_such_config(file: Path, such: str) -> str:
    """Returns the message for a config that does not exist, with similar names."""
    close = difflib.get_close_matches(file.stem, shipped_configs(), n=3)
    if file.suffix or len(file.parts) > 1:  # a path
        hint = f"; --config={close[0]} comes with top-jax" if close and close[0] == file.stem else ""
        return f"config file {file} does not exist{hint}; {such}"
    meant = f"did you mean {' or '.join(close)}? Otherwise " if close else ""
    return f"no config, file or run directory is named {file}; {meant}{such}"


def config_error(error: BaseException) -> InputError | None:
    """Returns the error in the config file, with its name and line; None if it came from elsewhere."""
    file = config_source().partition(":")[0]
    raised: BaseException | None = error
    while raised is not None:
        line = raised.lineno if isinstance(raised, SyntaxError) and raised.filename == file else None
        trace = raised.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == file:
                line = trace.tb_lineno
            trace = trace.tb_next
        if line is not None:
            kind = "" if isinstance(raised, InputError) else f"{type(raised).__name__}: "
            text = raised.msg if isinstance(raised, SyntaxError) else str(raised)
            return InputError(f"config file {file}, line {line}: {kind}{text}")
        raised = raised.__cause__ or raised.__context__
    return None


def config_source() -> str:
    """Returns the value of --config that `with_config` chose; empty without one."""
    return _take(COMMAND_LINE, "config")[0] or ""


def config_name() -> str:
    """Returns the name of the config file, or of the run directory: `vim_t` for configs/vim_t.py and for runs/vim_t."""
    file, _, run = config_source().partition(":")
    return Path(run).absolute().name if file == RUN_CONFIG else Path(file).stem
