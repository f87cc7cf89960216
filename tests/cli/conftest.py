"""Commands in this process: imports and compiled programs are paid for once."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
from absl import flags, logging
from small_models import model_of_shapes


class Result(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def _forget_flags(program: str) -> None:
    """Undoes what a command defined, so that the next one may; libraries define theirs once, when they are imported."""
    by_module = flags.FLAGS.flags_by_module_dict()
    started = [module for module in by_module if "/top_jax/cli/" in module]  # by `top-jax`
    defined = (program, *started, "top_jax.cli.shared_flags")
    ours = [flag.name for module in defined for flag in by_module.get(module, [])]
    overrides = [name for name in flags.FLAGS if name.startswith("config.")]
    for name in {*ours, *overrides} & set(flags.FLAGS):
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@functools.cache
def _code(program: str) -> CodeType:
    """A command's code; `runpy` would add the checks of types to it at every run, which takes longer than the run."""
    place = importlib.util.find_spec(f"top_jax.cli.{program}")
    assert place is not None and place.origin is not None
    return compile(Path(place.origin).read_text(), place.origin, "exec")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: os.PathLike[str]
) -> Iterator[Callable[..., Result]]:
    """Runs `command("train.py", ...)`, `command("evaluate", ...)` or `command("top-jax", ...)` as from the shell."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("top_jax.training.loop.enable_compilation_cache", lambda: None)
    verbosity, on_interrupt = logging.get_verbosity(), signal.getsignal(signal.SIGINT)

    def run(program: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end, warnings.catch_warnings():
                # ml_collections loads a config file by a method that Python 3.15 drops.
                warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
                if program == "top-jax":
                    importlib.import_module("top_jax.cli.main").main()
                elif program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    exec(_code(program), {"__name__": "__main__"})
        finally:
            _forget_flags(program)
        return Result(end.value.code or 0, *capsys.readouterr())

    yield run
    logging.set_verbosity(verbosity)
    signal.signal(signal.SIGINT, on_interrupt)


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


SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 10}


@pytest.fixture(scope="session")
def overrides() -> list[str]:
    """The model of tests/tiny_run.py as arguments of convert, beside --model=vim_tiny."""
    return [f"--override={name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Builds a model whose every weight is its own, the statistics of BatchNorm too."""

    def build(name: str, **sizes: Any) -> Any:
        import jax
        import numpy as np
        from flax import nnx

        from top_jax.models.weights import KINDS

        rng = np.random.default_rng(0)
        draw = lambda a: rng.integers(0, 9, a.shape) if a.shape == () else rng.normal(size=a.shape) / 8  # noqa: E731
        model = model_of_shapes(name, **sizes)
        nnx.update(model, jax.tree.map(lambda a: jax.device_put(draw(a).astype(a.dtype)), nnx.state(model, KINDS)))
        return model

    return build


@pytest.fixture
def official_file(tmp_path: Path, random_model: Callable[..., Any]) -> Path:
    """A .pth file of that model as the authors write them: EMA weights, here the halves, beside the plain ones."""
    torch = pytest.importorskip("torch")
    from top_jax.convert import state_dict_of

    weights = state_dict_of(random_model("vim_tiny", **SIZES))
    weights = {name: torch.from_numpy(array) for name, array in weights.items()}
    averaged = {name: value / 2 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": averaged, "epoch": 3}, tmp_path / "vim.pth")
    return tmp_path / "vim.pth"
