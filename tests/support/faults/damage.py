"""Checkpoints whose files are not what was written."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import runs

from faults.bench import Bench, Tally


def checkpoint(workdir: Path, which: str = "latest", place: int = -1) -> Path:
    """Returns a checkpoint's folder, by default the newest."""
    steps = sorted(int(path.name) for path in workdir.glob(f"checkpoints/{which}/*") if path.name.isdigit())
    return workdir / "checkpoints" / which / str(steps[place])


def index(folder: Path) -> Path:
    """Returns the file that says where the weights' arrays lie; other files may hold bytes that nothing reads."""
    return next((folder / "weights" / "d").iterdir())


def cut(file: Path) -> None:
    """Leaves the first half of a file, as after a power failure."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path, offset: int, bit: int = 0) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def newest_truncated(bench: Bench, tally: Tally) -> None:
    """Truncates the newest checkpoint: the run goes on from the one before, and says so."""
    workdir = bench.copy_of_stopped("truncated")
    file = index(checkpoint(workdir))
    cut(file)
    tally.done = f"{_name(file, workdir)} of the newest checkpoint cut in half"
    _falls_back(bench, tally, workdir)


def newest_empty(bench: Bench, tally: Tally) -> None:
    """Empties the newest checkpoint's folder: the run goes on from the one before."""
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
    assert f"going on from step {older}" in started.err and "Traceback" not in started.err
    assert started.first_step() == older and (workdir / "checkpoints" / "damaged" / str(newest)).is_dir()
    tally.steps_lost = newest - older
    tally.same(workdir, bench.finished())


def all_damaged(bench: Bench, tally: Tally) -> None:
    """Damages all checkpoints: the run stops with one line and moves nothing, so that a copy can be restored."""
    workdir = bench.copy_of_stopped("all-damaged")
    for place in (-1, -2):
        cut(index(checkpoint(workdir, place=place)))
    before = _contents(workdir / "checkpoints")
    tally.done, tally.tried = "a file of both checkpoints cut in half", 1
    line = bench.start(workdir).one_line_error()
    assert f"every checkpoint in {workdir}/checkpoints/latest is damaged" in line and "delete" not in line
    assert _contents(workdir / "checkpoints") == before, "something was moved"
    tally.notes.append("stops in one line, as it should")
    tally.survive()


def none_left(bench: Bench, tally: Tally) -> None:
    """Removes all checkpoints: the run starts from its first step."""
    workdir = bench.copy_of_stopped("none-left")
    tally.done, tally.tried = "all checkpoints removed, their folders left", 1
    tally.steps_lost = int(checkpoint(workdir).name)
    for which in ("latest", "best"):
        for folder in (workdir / "checkpoints" / which).iterdir():
            shutil.rmtree(folder)
    started = bench.start(workdir).end()
    assert started.first_step() == 0 and started.err == ""
    tally.same(workdir, bench.finished())


def best_damaged(bench: Bench, tally: Tally) -> None:
    """Damages the best checkpoint: an evaluation stops with one line, training goes on."""
    ways = {
        "the metrics of the best checkpoint cut in half": lambda best: cut(best / "metrics" / "metrics"),
        "its accuracy changed": lambda best: lower_accuracy(best / "metrics" / "metrics"),
        "an array file cut in half": lambda best: cut(index(best)),
        "its folder emptied": lambda best: [shutil.rmtree(path) for path in best.iterdir() if path.is_dir()],
    }
    tally.done = "; ".join(ways)
    for number, (what, harm) in enumerate(ways.items()):
        workdir = bench.copy_of_stopped(f"best-damaged-{number}")
        best = checkpoint(workdir, "best")
        harm(best)
        tally.tried += 1
        if what != "its accuracy changed":  # by which no weight is chosen: there is only one
            line = bench.evaluate(workdir).one_line_error()
            assert f"the 'best' checkpoint of {workdir} is damaged" in line, line
        started = bench.start(workdir).end()
        assert "Traceback" not in started.err, f"{what}: {started.err[-1000:]}"
        aside = (workdir / "checkpoints" / "damaged" / f"best-{best.name}").is_dir()
        assert aside == ("the best checkpoint is damaged (" in started.err) == (what != "an array file cut in half")
        tally.compare(workdir, bench.finished())
        assert tally.identical, "the weights differ"
        tally.survived += 1
        bench.say(f"{what}: {started.err.strip() or 'nothing said'}")


def lower_accuracy(file: Path) -> None:
    """Changes one digit of an accuracy."""
    text = file.read_text()
    place = next(i for i, c in enumerate(text) if c in "123456789")
    file.write_text(f"{text[:place]}{int(text[place]) - 1}{text[place + 1 :]}")


def any_bit(bench: Bench, tally: Tally) -> None:
    """Flips bits in every file of a checkpoint: each is detected, or changes nothing that is restored.

    In this process, one after the other: what is looked at is what a start of the run would restore.
    """
    source = bench.copy_of_stopped("any-bit")
    restored, newest = restore(source), checkpoint(source)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    rng, harmless, known = bench.random("any bit"), 0, None
    places = [(path, place) for path in files for place in _places(rng, path)]
    tally.done = f"one bit flipped at {len(places)} places of the {len(files)} files of the newest checkpoint"
    for number, (path, (offset, bit)) in enumerate(places):
        # Of a path that it has read before, TensorStore may not look at the file.
        workdir = shutil.copytree(source, bench.workdir(f"any-bit-{number}"))
        flip(workdir / path.relative_to(source), offset, bit)
        tally.tried += 1
        got = restore(workdir, like=restored)
        if got["position"] == restored["position"] and same_bits(got, restored):
            harmless += 1
        else:
            name = f"bit {bit} of byte {offset} of {_name(path, source)}"
            assert int(got["state"].step) < int(restored["state"].step), f"not noticed: {name}"
            known = (path, offset, bit) if path.parent.name == "d" else known
        tally.survived += 1
        shutil.rmtree(workdir)
        if number % 25 == 24:
            bench.say(f"{number + 1} of {len(places)} bits flipped, {harmless} of them without effect")
    tally.notes.append(f"{tally.tried - harmless} detected, {harmless} changed nothing that is restored")
    assert known is not None, "no bit of an array was flipped"
    path, offset, bit = known
    flip(path, offset, bit)
    _falls_back(bench, tally, source)
    tally.notes.append(f"a start after bit {bit} of byte {offset} of {_name(path, source)} went on from the one before")


def restore(workdir: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what a start of the run would go on from: the state, and its position in the stream."""
    from top_jax.training.checkpoints import Checkpoints
    from top_jax.training.prepare import prepare
    from top_jax.training.run_directory import RunDirectory

    run = RunDirectory(workdir)
    with Checkpoints(run.checkpoints) as checkpoints:
        if like is None:
            state, position = prepare(run.read_config(), run).start(checkpoints)
        else:
            state, position = checkpoints.restore(like["state"])
    return {"state": state, "position": position}


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two restored states are the same."""
    pairs = zip(jax.tree.leaves(a["state"]), jax.tree.leaves(b["state"]), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def _places(rng: random.Random, path: Path) -> list[tuple[int, int]]:
    """Returns bytes and bits to flip: every other byte of short JSON, and a few of other files."""
    size = path.stat().st_size
    if size <= 128 and path.name == "metadata":
        offsets = range(rng.randrange(2), size, 2)
    else:
        offsets = [rng.randrange(size) for _ in range(min(size, 3))]
    return [(offset, rng.randrange(8)) for offset in offsets]


def any_file(bench: Bench, tally: Tally) -> None:
    """Damages files of a checkpoint in four ways: each is detected, or changes nothing that is restored."""
    source = bench.copy_of_stopped("any-file")
    restored, newest = restore(source), checkpoint(source)
    rng, harmless = bench.random("any file"), 0
    ways = {
        "cut": cut,
        "emptied": lambda file: file.write_bytes(b""),
        "overwritten": lambda file: file.write_bytes(rng.randbytes(file.stat().st_size)),
        "removed": Path.unlink,
    }
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    cases = rng.sample([(path, way) for path in files for way in ways], 40)
    tally.done = f"40 times one of the {len(files)} files of the newest checkpoint {', '.join(ways)}"
    for number, (path, way) in enumerate(cases):
        workdir = shutil.copytree(source, bench.workdir(f"any-file-{number}"))
        ways[way](workdir / path.relative_to(source))
        tally.tried += 1
        got = restore(workdir, like=restored)
        if got["position"] == restored["position"] and same_bits(got, restored):
            harmless += 1
        else:
            assert int(got["state"].step) < int(restored["state"].step), f"{_name(path, source)} {way}: not noticed"
        tally.survived += 1
        shutil.rmtree(workdir)
    tally.notes.append(f"{tally.tried - harmless} detected, {harmless} changed nothing that is restored")


FLIPS: Final = 1000


def history(bench: Bench, tally: Tally) -> None:
    """Flips bits of metrics.jsonl, one at a time: nothing but that line is lost; then a start after one of them."""
    from top_jax.training import reporting

    workdir = bench.copy_of_stopped("damaged-history")
    file, rng, lost = workdir / "metrics.jsonl", bench.random("history"), 0
    written = file.read_bytes()
    tally.done = f"one bit of metrics.jsonl flipped, {FLIPS} times; one line overwritten before a start"
    copy = bench.workdir("history") / "metrics.jsonl"
    copy.parent.mkdir()
    logging.disable(logging.WARNING)
    try:
        for _ in range(FLIPS):
            place = rng.randrange(len(written))
            copy.write_bytes(written)
            flip(copy, place, rng.randrange(8))
            reporting._keep_until(copy, bench.total_steps)
            hit, left = written[:place].count(b"\n"), copy.read_bytes().splitlines()
            whole = [line for number, line in enumerate(written.splitlines()) if number != hit]
            if written[place : place + 1] == b"\n":  # two lines in one, or none of them
                whole = [line for line in whole if line != written.splitlines()[min(hit + 1, len(whole))]]
            missing = [line for line in whole if line not in left]
            assert not missing, f"byte {place}: lost {missing[0]!r}"
            lost += len(left) < written.count(b"\n")
            tally.tried += 1
            for kept in copy.parent.glob("*.damaged*"):
                kept.unlink()
    finally:
        logging.disable(logging.NOTSET)
    tally.notes.append(f"{lost} flips lost their line, {FLIPS - lost} left it readable")
    lines = written.splitlines(True)
    damaged = b"".join([*lines[:3], rng.randbytes(40) + b"\n", *lines[4:]])
    file.write_bytes(damaged)
    tally.tried += 1
    started = bench.start(workdir).end()
    assert "metrics.jsonl cannot be read (line 4 first)" in started.err and "Traceback" not in started.err, started.err
    assert (workdir / "metrics.jsonl.damaged").read_bytes() == damaged
    without = [line for number, line in enumerate(runs.metrics(bench.finished())) if number != 3]
    assert runs.metrics(workdir) == without, "another line was lost"
    runs.assert_same_weights(workdir, bench.finished())
    tally.identical, tally.difference = True, 0.0  # as the summary, which is among the lines compared
    tally.survive()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def _name(path: Path, workdir: Path) -> str:
    return str(path.relative_to(workdir / "checkpoints"))
