"""Shared by all trials of faults: where they run, how a start is watched, and what is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import runs

# Of a loss, relative, where the order of sums is another: other devices, or other processes.
ROUNDING: Final = 1e-5
PATIENCE: Final = 600.0  # seconds until a start counts as hanging


class Started:
    """A start of train.py that prints into files, since a full pipe would block it."""

    def __init__(self, process: subprocess.Popen[str], workdir: Path, out: Path, err: Path):
        self.process, self.workdir = process, workdir
        self._out, self._err = out, err

    @property
    def out(self) -> str:
        """Returns its stdout so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Returns its stderr so far, without warnings that a busy machine causes."""
        return runs.Launcher.surprises(self._err.read_text())

    def first_step(self) -> int | None:
        """Returns the step that it starts after; None if it has not printed it yet."""
        if found := re.search(r"going on after step (\d+)", self.out):
            return int(found[1])
        return 0 if ": starting; " in self.out else None

    def last_step(self) -> int:
        """Returns the last step that it reported; 0 before the first."""
        return int((re.findall(r"^train (\d+)/", self.out, re.MULTILINE) or [0])[-1])

    def until(self, happened: Callable[[], bool], every: float = 0.02) -> Started:
        """Waits until `happened`, checking every `every` seconds; fails if the process ends or time runs out."""
        try:
            runs.wait_for(self.process, happened, PATIENCE, every)
        except AssertionError as error:
            ended = self.process.poll()
            what = "nothing happened" if ended is None else f"it ended, with status {ended}"
            self.signal(signal.SIGKILL)
            raise AssertionError(f"{what}: {_last_line(self.err) or _last_line(self.out)}") from error
        return self

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> Started:
        """Sends SIGKILL and waits until the process is gone."""
        self.process.kill()
        self.process.wait()
        return self

    def end(self, status: int = 0, seconds: float = PATIENCE) -> Started:
        """Waits until it ends by itself, and checks its exit status."""
        try:
            got = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AssertionError(f"it did not end within {seconds:.0f} s: {_last_line(self.out)}") from error
        assert got == status, f"it ended with status {got}: {_last_line(self.err) or _last_line(self.out)}"
        return self

    def one_line_error(self, status: int = 1) -> str:
        """Waits for it to fail with one clear line, and returns the line."""
        self.end(status)
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), f"not one clear line: {self.err[-2000:]}"
        return lines[0]


@dataclasses.dataclass
class Tally:
    """Counts of one fault."""

    done: str = ""  # in words
    tried: int = 0
    survived: int = 0
    steps_lost: int | None = None  # reported before the fault and made again; None where nothing is taken up again
    difference: float | None = None  # of the final evaluation loss, relative; None where there is none to compare
    identical: bool | None = None  # whether every bit of the weights is
    notes: list[str] = dataclasses.field(default_factory=list)

    def lose(self, started: Started) -> None:
        """Counts the steps of an interrupted start that the next start repeats."""
        redone = max(0, started.last_step() - runs.latest_step(started.workdir))
        self.steps_lost = (self.steps_lost or 0) + redone

    def survive(self) -> None:
        """Counts everything tried so far as survived."""
        self.survived = self.tried

    def compare(self, workdir: Path, reference: Path) -> float:
        """Fills in the differences from a run without the fault; returns the largest relative one of a loss."""
        here, there = runs.summary(workdir)["loss"], runs.summary(reference)["loss"]
        self.difference = abs(here - there) / abs(there)
        try:
            runs.assert_same_weights(workdir, reference)
            self.identical = True
        except AssertionError:
            self.identical = False
        pairs = zip(_losses(workdir), _losses(reference), strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    def same(self, workdir: Path, reference: Path) -> None:
        """Checks that two runs are equal in every number and bit."""
        self.compare(workdir, reference)
        runs.assert_same_run(workdir, reference)
        self.survive()

    def close(self, workdir: Path, reference: Path) -> None:
        """Checks that two runs are equal up to rounding."""
        largest = self.compare(workdir, reference)
        self.notes.append(f"largest difference of a loss {largest:.1e}, relative")
        assert largest < ROUNDING, f"a loss differs by {largest:.1e}, relative"
        self.survive()


class Bench:
    """Starts runs of one config, to try faults on.

    Args:
        launcher: starts processes.
        scratch: an empty folder for the run directories.
        config: a file in configs/ or like those.
        flags: changes to it, as train.py takes them.
        kills: how often one run is killed at random moments.
        seed: of all random moments.
        finished: the run directory of an end without interruption, if there is one already.
        say: takes a line of progress.
    """

    def __init__(
        self,
        launcher: runs.Launcher,
        scratch: Path,
        *,
        config: Path = runs.TINY_CONFIG,
        flags: tuple[str, ...] = (),
        kills: int = 10,
        seed: int = 0,
        finished: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.launcher, self.scratch, self.config_file = launcher, scratch, config
        self.flags = (*flags, "--config.log_every=1")  # every step is to be seen
        self.kills, self.seed, self.say = kills, seed, say
        self.start_seconds, self.step_seconds = 8.0, 0.05  # until measured
        self._finished: dict[Any, Path] = {} if finished is None else {((), 1, None, ()): finished}
        self._starts = 0

    @functools.cached_property
    def config(self) -> Any:
        """The RunConfig of the run without interruption."""
        from top_jax.training.run_directory import RunDirectory

        return RunDirectory(self.finished()).read_config()

    @functools.cached_property
    def total_steps(self) -> int:
        """Number of steps of the run."""
        return runs.summary(self.finished())["steps"]

    def random(self, fault: str) -> random.Random:
        """Returns a generator that depends on the fault alone, not on which others are tried."""
        return random.Random(f"{self.seed} {fault}")

    def workdir(self, name: str) -> Path:
        """Returns a new run directory, not made yet."""
        return self.scratch / name

    def start(
        self, workdir: Path, *flags: str, devices: int = 1, program: str | None = None, **environment: str
    ) -> Started:
        """Starts train.py, or `program` in its place, on `devices` virtual devices."""
        self._starts += 1
        out, err = (self.scratch / f"start-{self._starts}.{name}" for name in ("out", "err"))
        variables = {**self.launcher.environment, "COLUMNS": "200", **environment}
        if devices > 1:
            variables["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        with out.open("w") as stdout, err.open("w") as stderr:
            options = {"config": self.config_file, "program": program, "env": variables}
            process = self.launcher.start(
                workdir, *self.flags, *flags, **options, stdout=stdout, stderr=stderr, start_new_session=True
            )
        return Started(process, workdir, out, err)

    def evaluate(self, workdir: Path) -> Started:
        """Starts the evaluation of a run's best checkpoint."""
        return self.start(workdir, f"--checkpoint={workdir}", program=EVALUATE)

    def finished(self, *flags: str, devices: int = 1, program: str | None = None, **environment: str) -> Path:
        """Returns the directory of a run without interruption; trained once for each set of arguments."""
        key = (flags, devices, program, tuple(environment.items()))
        if key not in self._finished:
            workdir = self.workdir(f"finished-{len(self._finished)}")
            self.say(f"a run without interruption {' '.join(flags)}")
            before = time.monotonic()
            started = self.start(workdir, *flags, devices=devices, program=program, **environment)
            started.until(lambda: started.last_step() > 0)
            first = time.monotonic()
            started.end()
            if not self._finished:
                self.start_seconds = first - before
                self.step_seconds = (time.monotonic() - first) / runs.summary(workdir)["steps"]
            self._finished[key] = workdir
        return self._finished[key]

    @functools.cached_property
    def stopped(self) -> Path:
        """Returns the directory of a run that was terminated in its second half; to be copied."""
        workdir = self.workdir("stopped")
        self.say("a run that is terminated, for its checkpoints to be damaged")
        self.terminate(workdir, runs.reached(workdir, self.total_steps * 6 // 10))
        return workdir

    def copy_of_stopped(self, name: str) -> Path:
        """Returns a copy of `stopped`, to be damaged."""
        return shutil.copytree(self.stopped, self.workdir(name))

    def terminate(self, workdir: Path, happened: Callable[[], bool], *flags: str, **options: Any) -> Started:
        """Starts a run, and sends SIGTERM at a moment."""
        started = self.start(workdir, *flags, **options).until(happened)
        started.signal(signal.SIGTERM)
        return started.end()


EVALUATE: Final = """
import runpy, sys
sys.argv = [argument for argument in sys.argv if not argument.startswith("--workdir=")]
runpy.run_module("top_jax.cli.evaluate", run_name="__main__")
"""


def _losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in runs.metrics(workdir)]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
