"""Checkpoints whose files are not what was written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from faults.bench import Bench, Tally


def checkpoint(workdir: Path, which: str = "latest", place: int = -1) -> Path:
    """A checkpoint's folder: by default the newest."""
    steps = sorted(int(path.name) for path in workdir.glob(f"checkpoints/{which}/*") if path.name.isdigit())
    return workdir / "checkpoints" / which / str(steps[place])


def largest(folder: Path) -> Path:
    """The largest of the files that hold arrays."""
    return max((path for path in folder.glob("**/d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(file: Path) -> None:
    """Leaves the first half, as a disk does that lost its power."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path, offset: int, bit: int = 0) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def newest_truncated(bench: Bench, tally: Tally) -> None:
    """The run goes on from the one before, and says so."""
    workdir = bench.copy_of_stopped("truncated")
    file = largest(checkpoint(workdir))
    cut(file)
    tally.done = f"the largest file of the newest checkpoint ({_name(file, workdir)}) cut in half"
    _falls_back(bench, tally, workdir)


def newest_flipped(bench: Bench, tally: Tally) -> None:
    """The same of one bit in the middle of it."""
    workdir = bench.copy_of_stopped("flipped")
    file = largest(checkpoint(workdir))
    flip(file, file.stat().st_size // 2)
    tally.done = f"one bit flipped in the largest file of the newest checkpoint ({_name(file, workdir)})"
    _falls_back(bench, tally, workdir)


def newest_empty(bench: Bench, tally: Tally) -> None:
    """A folder with a number and nothing in it."""
    workdir = bench.copy_of_stopped("emptied")
    newest = checkpoint(workdir)
    shutil.rmtree(newest)
    newest.mkdir()
    tally.done = f"the folder of the newest checkpoint ({_name(newest, workdir)}) emptied"
    _falls_back(bench, tally, workdir)


def _falls_back(bench: Bench, tally: Tally, workdir: Path) -> None:
    newest, older = int(checkpoint(workdir).name), int(checkpoint(workdir, place=-2).name)
    tally.tried += 1
    started = bench.start(workdir).end()
    assert f"the checkpoint of step {newest} is damaged (" in started.err
    assert f"going on from the one of step {older}" in started.err and "Traceback" not in started.err
    assert started.first_step() == older and (workdir / "checkpoints" / "damaged" / str(newest)).is_dir()
    tally.steps_lost = newest - older
    tally.same(workdir, bench.finished())


def all_damaged(bench: Bench, tally: Tally) -> None:
    """One clear line, and nothing is moved or written over: a copy may be put back."""
    workdir = bench.copy_of_stopped("all-damaged")
    for place in (-1, -2):
        cut(largest(checkpoint(workdir, place=place)))
    before = _contents(workdir / "checkpoints")
    tally.done, tally.tried = "the largest file of both checkpoints cut in half", 1
    line = bench.start(workdir).one_line_error()
    assert f"no checkpoint in {workdir}/checkpoints/latest can be read" in line and "Restore one from a copy" in line
    assert _contents(workdir / "checkpoints") == before, "something was moved"
    tally.notes.append("stops in one line, as it should")
    tally.survive()


def none_left(bench: Bench, tally: Tally) -> None:
    """Empty folders of checkpoints are a run that starts."""
    workdir = bench.copy_of_stopped("none-left")
    tally.done, tally.tried, tally.steps_lost = "all checkpoints removed, their folders left", 1, 0
    tally.steps_lost = int(checkpoint(workdir).name)
    for which in ("latest", "best"):
        for folder in (workdir / "checkpoints" / which).iterdir():
            shutil.rmtree(folder)
    started = bench.start(workdir).end()
    assert started.first_step() == 0 and started.err == ""
    tally.same(workdir, bench.finished())


def best_damaged(bench: Bench, tally: Tally) -> None:
    """An evaluation says so in one line; training goes on."""
    ways = {
        "the metrics of the best checkpoint cut in half": lambda best: cut(best / "metrics" / "metrics"),
        "its accuracy changed": lambda best: _lower_accuracy(best / "metrics" / "metrics"),
        "an array file cut in half": lambda best: cut(largest(best)),
        "its folder emptied": lambda best: [shutil.rmtree(path) for path in best.iterdir() if path.is_dir()],
    }
    tally.done = "; ".join(ways)
    for number, (what, harm) in enumerate(ways.items()):
        workdir = bench.copy_of_stopped(f"best-damaged-{number}")
        harm(checkpoint(workdir, "best"))
        tally.tried += 1
        line = bench.evaluate(workdir).one_line_error()
        assert "the 'best' checkpoint of" in line and "cannot be read" in line, line
        started = bench.start(workdir).end()
        assert "Traceback" not in started.err, f"{what}: {started.err[-1000:]}"
        tally.compare(workdir, bench.finished())
        assert tally.identical, "the weights differ"
        tally.survived += 1
        bench.say(f"{what}: {started.err.strip() or 'nothing said'}")


def _lower_accuracy(file: Path) -> None:
    text = file.read_text()
    place = next(i for i, c in enumerate(text) if c in "123456789")
    file.write_text(f"{text[:place]}{int(text[place]) - 1}{text[place + 1 :]}")


def any_bit(bench: Bench, tally: Tally) -> None:
    """Flips in every file of a checkpoint: each is known, or changes nothing that is restored.

    In this process, one after the other: what is looked at is what a start of the run would restore.
    """
    workdir = bench.copy_of_stopped("any-bit")
    restored = restore(workdir)
    newest = checkpoint(workdir)
    intact = {path: path.read_bytes() for path in sorted(newest.rglob("*")) if path.is_file()}
    rng, harmless = bench.random("any bit"), 0
    places = [(path, place) for path, content in intact.items() for place in _places(rng, path, len(content))]
    tally.done = f"one bit flipped at {len(places)} places of the {len(intact)} files of the newest checkpoint"
    for number, (path, (offset, bit)) in enumerate(places):
        flip(path, offset, bit)
        tally.tried += 1
        got = restore(workdir, like=restored)
        if got["position"] == restored["position"] and _same_bits(got, restored):
            harmless += 1
        else:
            name = f"bit {bit} of byte {offset} of {_name(path, workdir)}"
            assert int(got["state"].step) < int(restored["state"].step), f"not noticed: {name}"
            shutil.rmtree(newest, ignore_errors=True)
            (workdir / "checkpoints" / "damaged" / newest.name).rename(newest)
        tally.survived += 1
        path.write_bytes(intact[path])
        if number % 25 == 24:
            bench.say(f"{number + 1} of {len(places)} bits flipped, {harmless} of them without effect")
    tally.notes.append(f"{tally.tried - harmless} detected, {harmless} changed nothing that is restored")


def restore(workdir: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a start of the run would go on from: the state, and its position in the stream."""
    from top_jax.training.checkpoints import Checkpoints
    from top_jax.training.plan import make_plan
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.start import start_or_resume

    run = RunDirectory(workdir)
    with Checkpoints(run.checkpoints) as checkpoints:
        if like is None:
            state, position = start_or_resume(make_plan(run.read_config()), checkpoints, None)
        else:
            state, position = checkpoints.restore(like["state"])
    return {"state": state, "position": position}


def _same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = zip(jax.tree.leaves(a["state"]), jax.tree.leaves(b["state"]), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def _places(rng: random.Random, path: Path, size: int) -> list[tuple[int, int]]:
    """Bytes and bits to flip; all bytes of a file of a few: of JSON, every character says something."""
    offsets = range(size) if size <= 128 and "metadata" in path.name else [rng.randrange(size) for _ in range(4)]
    return [(offset, rng.randrange(8)) for offset in offsets if size]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def _name(path: Path, workdir: Path) -> str:
    return str(path.relative_to(workdir / "checkpoints"))
