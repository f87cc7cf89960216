"""Commands in this process: imports and compiled programs are paid for once."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from absl import flags, logging


class Result(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def _forget_flags(program: str) -> None:
    """Undoes what a command defined, so that the next one may; libraries define theirs once, when they are imported."""
    by_module = flags.FLAGS.flags_by_module_dict()
    ours = [flag.name for module in (program, "top_jax.cli.config_flag") for flag in by_module.get(module, [])]
    overrides = [name for name in flags.FLAGS if name.startswith("config.")]
    for name in {*ours, *overrides} & set(flags.FLAGS):
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: os.PathLike[str]
) -> Iterator[Callable[..., Result]]:
    """Runs `command("train.py", ...)` or `command("evaluate", ...)` as from the shell, in the checkout."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("top_jax.training.loop.enable_compilation_cache", lambda: None)
    verbosity = logging.get_verbosity()

    def run(program: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end, warnings.catch_warnings():
                # ml_collections loads a config file by a method that Python 3.15 drops.
                warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
                if program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    runpy.run_module(f"top_jax.cli.{program}", run_name="__main__")
        finally:
            _forget_flags(program)
        return Result(end.value.code or 0, *capsys.readouterr())

    yield run
    logging.set_verbosity(verbosity)


@pytest.fixture
def refused(command: Callable[..., Result]) -> Callable[..., str]:
    """Runs a command that must end with status 2 and one line on stderr; returns the line."""

    def run(program: str, *arguments: str) -> str:
        result = command(program, *arguments)
        assert result.status == 2, result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1 and result.err.endswith("\n")
        assert result.out == ""
        return result.err.removeprefix("error: ").strip()

    return run
