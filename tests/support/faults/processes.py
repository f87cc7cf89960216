"""Two processes of one run, one or both of which are killed or stopped."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Final

import runs

from faults.bench import Bench, Started, Tally
from faults.damage import checkpoint, cut, index
from faults.kills import random_steps

HEARTBEAT: Final = 10  # seconds without a sign of life until a process counts as lost
BOUND: Final = 90.0  # seconds until the other has ended: several heartbeats, on a busy machine


class Pair:
    """Two processes on this machine, joined by jax.distributed."""

    def __init__(self, bench: Bench, workdir: Path, *, heartbeat: int | None = HEARTBEAT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--distributed --coordinator_address={address} --num_processes=2".split()
        if heartbeat is not None:
            flags.append(f"--heartbeat_timeout={heartbeat}")
        self.members = [bench.start(workdir, *flags, f"--process_id={number}") for number in range(2)]

    @property
    def first(self) -> Started:
        """The process that reports."""
        return self.members[0]

    def until_step(self, step: int) -> Pair:
        """Waits for the report of a step."""
        self.first.until(lambda: self.first.last_step() >= step)
        return self

    def kill(self) -> None:
        """Kills what is left of both."""
        for member in self.members:
            member.kill()

    def end(self) -> Pair:
        """Waits until both have ended well."""
        try:
            for member in self.members:
                member.end()
        finally:
            self.kill()
        return self


def finished_pair(bench: Bench) -> Path:
    """Returns the directory of an uninterrupted run of two processes; trained once."""
    workdir = bench.workdir("finished-pair")
    if not (workdir / "summary.json").exists():
        bench.say("a run of two processes without interruption")
        Pair(bench, workdir).end()
    return workdir


def uninterrupted(bench: Bench, tally: Tally) -> None:
    """No fault, but the reference of the others: two processes and one give the same losses."""
    tally.done, tally.tried = "nothing: two processes instead of one", 1
    tally.close(finished_pair(bench), bench.finished())


def one_killed(bench: Bench, tally: Tally) -> None:
    """Kills one process: the other ends by itself instead of waiting for ever; then both are started again."""
    rng, workdir, reference = bench.random("one of two"), bench.workdir("one-of-two-killed"), finished_pair(bench)
    steps = random_steps(rng, bench.total_steps, 2)
    tally.done = f"SIGKILL of the second process at step {steps[0]}, then of the first at step {steps[1]}"
    for victim, step in zip((1, 0), steps, strict=True):
        pair = Pair(bench, workdir)
        try:
            pair.until_step(step).members[victim].kill()
            tally.tried += 1
            before = time.monotonic()
            survivor = pair.members[1 - victim]
            status = survivor.process.wait(BOUND)
        finally:
            pair.kill()
        bench.say(f"process {victim} killed: the other ended {time.monotonic() - before:.0f} s later, status {status}")
        tally.notes.append(f"the other ended {time.monotonic() - before:.0f} s later, status {status}")
        assert status == 1 and survivor.err.splitlines()[-1].startswith("error: "), f"{status}: {survivor.err[-2000:]}"
        tally.lose(pair.first)
    Pair(bench, workdir).end()
    tally.same(workdir, reference)


def one_stopped(bench: Bench, tally: Tally) -> None:
    """Stops one process without ending it, as a machine that hangs: the other ends after the default timeout."""
    workdir, reference = bench.workdir("one-of-two-stopped"), finished_pair(bench)
    tally.done = "SIGSTOP of the second process at step 6, then of the first at step 12; the default heartbeat (20 s)"
    for victim, step in ((1, 6), (0, 12)):
        pair = Pair(bench, workdir, heartbeat=None)
        try:
            pair.until_step(step).members[victim].signal(signal.SIGSTOP)
            tally.tried += 1
            before = time.monotonic()
            survivor = pair.members[1 - victim]
            status = survivor.process.wait(BOUND)
        finally:
            pair.kill()
        tally.notes.append(f"the other ended {time.monotonic() - before:.0f} s later, status {status}")
        bench.say(tally.notes[-1])
        assert status == 1 and survivor.err.splitlines()[-1].startswith("error: "), f"{status}: {survivor.err[-2000:]}"
        tally.lose(pair.first)
    Pair(bench, workdir).end()
    tally.same(workdir, reference)


def both_killed(bench: Bench, tally: Tally) -> None:
    """Kills both processes at once, as in a power failure."""
    rng, workdir, reference = bench.random("both"), bench.workdir("both-killed"), finished_pair(bench)
    step = rng.randint(bench.total_steps // 3, bench.total_steps - 3)
    tally.done, tally.tried = f"SIGKILL of both processes at step {step}", 1
    pair = Pair(bench, workdir)
    try:
        pair.until_step(step)
    finally:
        pair.kill()
    tally.lose(pair.first)
    Pair(bench, workdir).end()
    tally.same(workdir, reference)


def one_terminated(bench: Bench, tally: Tally) -> None:
    """Sends SIGTERM to one process: both stop after the same step and save it."""
    rng, workdir, reference = bench.random("terminated"), bench.workdir("one-of-two-terminated"), finished_pair(bench)
    half = bench.total_steps // 2
    steps = rng.randint(2, half - 3), rng.randint(half + 2, bench.total_steps - 4)
    tally.done = f"SIGTERM of only the second process at step {steps[0]}, then of only the first at step {steps[1]}"
    for number, step in zip((1, 0), steps, strict=True):
        pair = Pair(bench, workdir).until_step(step)
        tally.tried += 1
        pair.members[number].signal(signal.SIGTERM)
        pair.end()
        saved = runs.latest_step(workdir)
        assert step <= saved < bench.total_steps and f": saved at step {saved}; start the same" in pair.first.out
        tally.lose(pair.first)
        tally.survive()
    assert tally.steps_lost == 0, "a step was not saved"
    Pair(bench, workdir).end()
    tally.same(workdir, reference)


def newest_damaged(bench: Bench, tally: Tally) -> None:
    """Damages the newest checkpoint: both processes fall back to the same one."""
    reference = finished_pair(bench)
    workdir = shutil.copytree(reference, bench.workdir("pair-damaged"))
    (workdir / "summary.json").unlink()
    newest, older = (int(checkpoint(workdir, place=place).name) for place in (-1, -2))
    cut(index(checkpoint(workdir)))
    tally.done, tally.tried, tally.steps_lost = "a file of their newest checkpoint cut in half", 1, newest - older
    pair = Pair(bench, workdir).end()
    assert pair.first.first_step() == older
    assert f"going on from step {older}" in pair.first.err and "Traceback" not in pair.first.err
    tally.same(workdir, reference)
