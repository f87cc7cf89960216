"""Starts, kills and compares runs of train.py in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compilation import XLA_FLAGS

ROOT = Path(__file__).parents[2]
TINY_CONFIG = ROOT / "tests" / "tiny_run.py"
# What depends on the clock, or on which programs a start compiled, and not on the weights.
TIMED = (
    "images_per_second",
    "ema_images_per_second",
    "train_images_per_second",
    "data_wait",
    "peak_memory",
    "step_memory",
)


class Launcher:
    """Starts train.py on tests/tiny_run.py in its own process; compiled programs are shared between starts.

    Args:
        cache: the folder of compiled programs.
        optimize: False compiles in half the time, which is what counts for models of the tests' size.
    """

    def __init__(self, cache: Path, *, optimize: bool = False):
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "" if optimize else XLA_FLAGS,
        }

    def start(
        self, workdir: Path, *flags: str, config: Path = TINY_CONFIG, program: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts train.py, or `program` in its place with the same command line."""
        script = ["train.py"] if program is None else ["-c", program]
        command = [sys.executable, *script, f"--config={config}", f"--workdir={workdir}", *flags]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": self.environment}
        return subprocess.Popen(command, cwd=ROOT, **{**settings, **options})

    def finish(self, workdir: Path, *flags: str, **options: Any) -> tuple[str, str]:
        process = self.start(workdir, *flags, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, self.surprises(err)

    @staticmethod
    def surprises(err: str) -> str:
        """Returns stderr without Orbax's hint of a slow disk, which a busy machine causes."""
        return "".join(line for line in err.splitlines(True) if "Waiting for previous save to complete" not in line)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def summary(workdir: Path) -> dict[str, Any]:
    content = json.loads((workdir / "summary.json").read_text())
    return {name: value for name, value in content.items() if name not in TIMED}


def assert_same_run(workdir: Path, finished: Path) -> None:
    """Checks that every reported number, the result, and every bit of the final and best weights are equal."""
    assert metrics(workdir) == metrics(finished)
    assert summary(workdir) == summary(finished)
    for which in ("latest", "best"):
        assert_same_weights(workdir, finished, which)


def assert_same_weights(workdir: Path, finished: Path, which: str = "latest") -> None:
    """Checks that every bit of a checkpoint's weights, and of their average if there is one, is equal."""
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.weights import read_weights

    with_ema = RunDirectory(finished).read_config().optimizer.ema_decay is not None
    for ema in (False, True) if with_ema else (False,):
        here, there = (read_weights(RunDirectory(path), which, ema) for path in (workdir, finished))
        jax.tree.map(np.testing.assert_array_equal, here, there)


def wait_for(
    process: subprocess.Popen[str], happened: Callable[[], bool], seconds: float = 600, every: float = 0.004
) -> None:
    """Waits until `happened`; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(every)


def reached(workdir: Path, step: int) -> Callable[[], bool]:
    file = workdir / "metrics.jsonl"
    return lambda: file.is_file() and f'"kind": "train", "step": {step},' in file.read_text()


def half_written(workdir: Path, which: str, after: int) -> Callable[[], bool]:
    """Returns whether a checkpoint of a later step than `after` is being written; Orbax renames it when complete."""

    def happened() -> bool:
        folders = (workdir / "checkpoints" / which).glob("*tmp*")
        return any(int(folder.name.split(".")[0]) > after for folder in folders)

    return happened


def kill_at(launcher: Any, workdir: Path, happened: Callable[[], bool], *flags: str) -> None:
    process = launcher.start(workdir, *flags)
    wait_for(process, happened)
    process.kill()
    process.communicate()


def latest_step(workdir: Path) -> int:
    folders = (workdir / "checkpoints" / "latest").glob("*")
    return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=0)
