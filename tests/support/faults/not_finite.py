"""Numbers that are not finite: from a few batches, or from every step."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import runs

from faults.bench import Bench, Started, Tally

# train.py, whose step makes numbers that are not finite of the batches NAN_BATCHES, and which leaves the batches
# SKIPPED_BATCHES out from the beginning.
PROGRAM: Final = """
import os, runpy, sys
import jax, jax.numpy as jnp
import top_jax.training.loop as loop
from top_jax.training.prepare import Prepared
from top_jax.training.programs import TrainPrograms

numbers = lambda name: [int(n) for n in os.environ.get(name, "").split(",") if n]
broken, left_out = numbers("NAN_BATCHES"), numbers("SKIPPED_BATCHES")
batches, step, start = loop.Loop._batches, TrainPrograms.__call__, Prepared.start
at = None
def noted(self, stream, position):
    global at
    for batch, after in batches(self, stream, position):
        at = after["batches"] - 1
        yield batch, after
def broken_step(self, *arguments):
    state, metrics = step(self, *arguments)
    if at in broken:
        spoil = lambda a: a * jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else a
        state, metrics = jax.tree.map(spoil, state), {**metrics, "loss": metrics["loss"] * jnp.nan}
    return state, metrics
def started(*arguments):
    state, position = start(*arguments)
    return state, {**position, "skipped": sorted({*position["skipped"], *left_out})}
loop.Loop._batches, TrainPrograms.__call__, Prepared.start = noted, broken_step, started
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def broken_batches(total_steps: int) -> tuple[int, ...]:
    """Returns numbers of batches: one before anything is saved, and two in a row in the middle."""
    middle = total_steps // 2 + 1
    return 1, middle, middle + 1


def broken_run(bench: Bench, workdir: Path) -> Started:
    """Starts a run in which some batches give a loss and weights that are not finite."""
    return bench.start(workdir, program=PROGRAM, NAN_BATCHES=",".join(map(str, broken_batches(bench.total_steps))))


def without_broken_batches(bench: Bench) -> Path:
    """Returns the run that never sees these batches."""
    left_out = ",".join(map(str, broken_batches(bench.total_steps)))
    return bench.finished(program=PROGRAM, SKIPPED_BATCHES=left_out)


def a_few_batches(bench: Bench, tally: Tally) -> None:
    """The run goes back to its last checkpoint each time, and ends as if it had never seen these batches."""
    broken, workdir = broken_batches(bench.total_steps), bench.workdir("not-finite")
    reference = without_broken_batches(bench)
    tally.done, tally.tried = f"a loss that is nan, and so the weights, of batches {broken}", len(broken)
    started = broken_run(bench, workdir).end()
    tally.steps_lost = went_back(started, broken)
    tally.notes.append("compared with a run that leaves these batches out from the beginning")
    tally.same(workdir, reference)


def went_back(started: Started, broken: tuple[int, ...]) -> int:
    """Checks that a run went back for each of these batches and said so; returns the steps that it lost."""
    lost = 0
    for count, batch in enumerate(broken, 1):
        step = batch - count + 2  # the one that would follow, had the others never been drawn
        lines = [line for line in started.out.splitlines() if f"without batch {batch} ({count} " in line]
        assert len(lines) == 1 and lines[0].startswith(f"the loss of step {step} is nan: back to step "), started.out
        lost += step - 1 - int(lines[0].split("back to step ")[1].split(",")[0])
    assert started.err == "" and str(list(broken)) in started.out
    return lost


def killed_after_going_back(bench: Bench, tally: Tally) -> None:
    """Kills the run each time it has gone back: skipped batches stay skipped."""
    broken, workdir = broken_batches(bench.total_steps), bench.workdir("not-finite-and-killed")
    reference = without_broken_batches(bench)
    tally.done = f"a loss that is nan, of batches {broken}; SIGKILL after each time that the run had gone back"
    for count in range(1, len(broken) + 1):
        started = broken_run(bench, workdir)
        started.until(lambda started=started, count=count: f"({count} skipped" in started.out).kill()
        tally.tried += 1
        tally.lose(started)
    broken_run(bench, workdir).end()
    tally.notes.append("compared with a run that leaves these batches out from the beginning")
    tally.same(workdir, reference)


def never_finite(bench: Bench, tally: Tally) -> None:
    """The run gives up after `max_rollbacks`, in one line, and leaves a sound checkpoint."""
    from top_jax.training import load_checkpoint

    workdir = bench.workdir("never-finite")
    tally.done, tally.tried = "a learning rate of 1e30; max_rollbacks=2", 1
    flags = ("optimizer.learning_rate=1e30", "checkpoint_every=1", "max_rollbacks=2")
    started = bench.start(workdir, *(f"--config.{flag}" for flag in flags))
    line = started.one_line_error()
    step = runs.latest_step(workdir)
    assert f" of step {step + 1} is " in line and "2 batches" in line and "max_rollbacks" in line
    assert f"the checkpoint of step {step} is kept" in line and "optimizer.clip_norm" in line
    assert started.out.count(": back to step ") == 2 and not (workdir / "summary.json").exists()
    assert [reported["step"] for reported in runs.metrics(workdir)] == list(range(1, step + 1))
    load_checkpoint(workdir, "latest")  # and its seal holds
    tally.notes.append("gives up, as it should")
    tally.survive()
