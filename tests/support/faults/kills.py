"""SIGKILL: at random moments, and while a checkpoint is being written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from typing import Final

from runs import half_written, latest_step, reached

from faults.bench import Bench, Started, Tally

ATTEMPTS: Final = 6  # at a moment that lasts milliseconds


def at_random_moments(bench: Bench, tally: Tally) -> None:
    """Kills one run repeatedly: at random steps, a random time after each.

    A moment that an earlier start has passed already is one of the start itself.
    """
    _at_random_moments(bench, tally, "killed-at-random")


def with_workers(bench: Bench, tally: Tally) -> None:
    """The same of a run whose batches come from two worker processes."""
    _at_random_moments(bench, tally, "killed-with-workers", "--config.data.num_workers=2")
    tally.done += ", with two data workers"


def _at_random_moments(bench: Bench, tally: Tally, name: str, *flags: str) -> None:
    rng, workdir = bench.random("kills"), bench.workdir(name)
    reference, done = bench.finished(), 0
    moments = random_steps(rng, bench.total_steps, bench.kills)
    tally.done, tally.steps_lost = f"SIGKILL of one run around steps {', '.join(map(str, moments))}", 0
    in_start = 0
    for step in moments:
        started = bench.start(workdir, *flags)
        if step > done:
            started.until(reached(workdir, step))
            _wait(started, rng.uniform(0, 3 * bench.step_seconds), until_step=bench.total_steps - 2)
        else:
            _wait(started, rng.uniform(0, bench.start_seconds), until_step=1)
            in_start += 1
        assert started.kill().process.returncode != 0, "it had ended before it was killed"
        tally.tried += 1
        if started.first_step() is not None:
            tally.survived = tally.tried - 1  # all but this one
        tally.lose(started)
        done = max(done, started.last_step())
        bench.say(f"killed at step {started.last_step() or '(none yet)'}, saved is step {latest_step(workdir)}")
    if in_start:
        tally.notes.append(f"{in_start} of the moments fell into the start")
    bench.start(workdir, *flags).end()
    tally.same(workdir, reference)


def _wait(started: Started, seconds: float, until_step: int) -> None:
    """Waits for some seconds, or until a step is reported: starts differ in speed."""
    end = time.monotonic() + seconds
    started.until(lambda: time.monotonic() > end or started.last_step() >= until_step)


def random_steps(rng: random.Random, total_steps: int, count: int) -> list[int]:
    """Returns random steps in order, at least one in each half of the run if there are two or more."""
    last = total_steps - 3  # so that it is there to be killed
    halves = [rng.randint(1, last // 2), rng.randint(last // 2 + 1, last)][-count:]
    return sorted(halves + [rng.randint(1, last) for _ in range(count - len(halves))])


def while_saving_the_latest(bench: Bench, tally: Tally) -> None:
    """Kills while the second checkpoint is being written."""
    _while_saving(bench, tally, "latest", after=bench.config.checkpoint_every)


def while_saving_the_best(bench: Bench, tally: Tally) -> None:
    """Kills while the first best weights are being written."""
    _while_saving(bench, tally, "best", after=0)


def _while_saving(bench: Bench, tally: Tally, which: str, after: int) -> None:
    reference, workdir = bench.finished(), bench.workdir(f"killed-while-saving-{which}")
    half: list[str] = []
    while not half:
        assert tally.tried < ATTEMPTS, "it was never caught while it wrote"
        started = bench.start(workdir).until(half_written(workdir, which, after), every=0.0005).kill()
        tally.tried += 1
        tally.lose(started)
        folders = [path.name for path in workdir.glob(f"checkpoints/{which}/*")]
        half = [name for name in folders if "tmp" in name]
        after = max((int(name) for name in folders if name.isdigit()), default=after)
    tally.done = f"SIGKILL while {which}/{half[0].split('.')[0]} was half written"
    started = bench.start(workdir).end()
    assert not list(workdir.glob("checkpoints/*/*tmp*")), "what was half written is still there"
    tally.same(workdir, reference)


def a_starting_worker(bench: Bench, tally: Tally) -> None:
    """Kills the data worker while it starts, and a later start's at work: one line each; then the run goes on."""
    workdir, reference = bench.workdir("worker-killed"), bench.finished()
    tally.done = "SIGKILL of a data worker while it started, and of another after step 5"
    for step in (None, 5):
        started = bench.start(workdir, "--config.data.num_workers=1")
        if step is not None:
            started.until(reached(workdir, step))
        workers: list[int] = []
        started.until(lambda started=started, workers=workers: bool(workers.extend(_workers(started)) or workers))
        os.kill(workers[0], signal.SIGKILL)
        tally.tried += 1
        assert "data worker was killed" in started.one_line_error()
        tally.lose(started)
    bench.start(workdir).end()
    tally.same(workdir, reference)


def _workers(started: Started) -> list[int]:
    """Returns the process ids of a start's data workers."""
    group = ["pgrep", "-g", str(started.process.pid), "-f", "multiprocessing.spawn"]
    return [int(number) for number in subprocess.run(group, capture_output=True, text=True, check=False).stdout.split()]
