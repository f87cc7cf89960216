"""A race over batch sizes, its programs made up: what fits, what there is time for, what is reported."""

import itertools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from top_jax.benchmark import compare, race
from top_jax.benchmark.compare_text import text
from top_jax.benchmark.contestants import DENSE, field_of
from top_jax.benchmark.programs import PASSES
from top_jax.errors import InputError
from top_jax.pruning import Pruning

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "d_state": 2, "num_classes": 3}
TOP = Pruning(after_blocks=(1,), keep_ratio=0.5)
CONFIG = "top hold (config)"


@pytest.fixture(scope="module")
def field():
    return field_of("vim_tiny", TOP, SIZES)[0]


@pytest.fixture
def programs(monkeypatch):
    """Programs that answer at once; `fits` says the largest batch of each contestant, `mib` what a program takes."""
    told = SimpleNamespace(fits={}, mib=1, compiled=[])

    class Program:
        def __init__(self, name):
            self.largest = told.fits.get(name, 10**6)

        def __call__(self, *arguments):
            images = arguments[1] if len(arguments) == 2 else arguments[2]
            if len(images) > self.largest:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes.")
            return jnp.zeros(()) if len(arguments) == 2 else (arguments[0], arguments[1], jnp.zeros(()))

        def memory_analysis(self):
            sizes = {f"{kind}_size_in_bytes": 0 for kind in ("argument", "output", "alias")}
            return SimpleNamespace(temp_size_in_bytes=told.mib * 2**20, **sizes)

    def compile_all(lower, workers):
        told.compiled.append(tuple(lower))
        return {name: (Program(name), 0.5) for name in lower}

    monkeypatch.setattr(race, "compile_all", compile_all)
    monkeypatch.setattr(race, "make_batches", lambda config, batch: [(jnp.zeros((batch, 1)), jnp.zeros(batch))])
    monkeypatch.setattr(race, "MOST_ROUNDS", 6)
    return told


def run(field, sizes, *, seconds=1e6, memory=None, passes=PASSES[:1]):
    return race.Race(field, seconds, memory=memory, workers=2).run(passes, sizes, lambda: None)


def sizes_of(rows, name):
    return [row["batch"] for row in rows if row["contestant"] == name and "error" not in row]


def test_sizes_grow():
    assert list(itertools.islice(race.growing(), 6)) == [1, 8, 32, 64, 128, 256]


def test_up_to_the_largest_that_fits(field, programs):
    """Each leaves where it runs out of memory; the dense model ends it."""
    programs.fits = {DENSE: 32, CONFIG: 64, "deit": 8}
    rows, skipped = run(field, race.growing)
    assert sizes_of(rows, DENSE) == [1, 8, 32] and sizes_of(rows, CONFIG) == [1, 8, 32, 64]
    assert sizes_of(rows, "deit") == [1, 8]
    failed = [(row["contestant"], row["batch"], row["out_of_memory"]) for row in rows if "error" in row]
    assert failed == [("deit", 32, True), (DENSE, 64, True)]
    alone = next(row for row in rows if row["batch"] == 64 and row["contestant"] == CONFIG)
    assert "speedup" not in alone and "verdict" not in alone and alone["images_per_s"] > 0
    (rest,) = skipped
    assert (rest["batch"], rest["and_larger"], rest["reason"]) == (128, True, "the dense model did not run before")


def test_images_that_do_not_fit(field, programs, monkeypatch):
    def refuse(config, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(race, "make_batches", refuse)
    rows, (skipped,) = run(field, race.growing)
    assert not rows and skipped["reason"] == "the images alone do not fit in memory"


def test_what_takes_more_than_it_may_is_not_run(field, programs):
    rows, _ = run(field[:1], lambda: (1,), memory=2**20)
    assert "error" not in rows[0] and rows[0]["program_mib"] == 1
    programs.mib = 2
    rows, _ = run(field[:1], lambda: (1,), memory=2**20)
    assert rows[0]["error"] == "MemoryError: it needs 2 MiB, and 1 MiB may be used" and rows[0]["out_of_memory"]


def test_without_time_the_first_two_run(field, programs):
    rows, skipped = run(field, race.growing, seconds=0.0)
    assert programs.compiled == [(DENSE, CONFIG)] and [row["contestant"] for row in rows] == [DENSE, CONFIG]
    assert [row["rounds"] for row in rows] == [race.LEAST_ROUNDS] * 2
    assert [(row["batch"], row["and_larger"]) for row in skipped] == [(1, False), (8, True)]
    assert skipped[0]["contestants"] == [contestant.name for contestant in field[2:]]
    assert all("0 s of the budget are left" in row["reason"] for row in skipped)


def test_the_train_step_has_its_share(field, programs):
    rows, skipped = run(field, lambda: (2,), passes=PASSES)
    assert [row["pass"] for row in rows] == [PASSES[0]] * len(field) + [PASSES[1]] * len(field)
    assert not skipped
    assert all(
        len(row["times_ms"]) == row["rounds"] and row["speedup"] > 0 for row in rows if row["contestant"] != DENSE
    )
    verdicts = {row["contestant"] for row in rows if "verdict" in row}
    assert verdicts == {contestant.name for contestant in field if contestant.prunes}


def test_time_is_foreseen(monkeypatch):
    monkeypatch.setattr(race.time, "perf_counter", lambda: 100.0)
    pace = race._Pace(end=200.0, group=0.0)
    assert pace.too_long(1024) is None  # nothing is known
    pace.note_group(30.0)
    pace.note_group(20.0)
    pace.note_rounds(1.25, batch=8)
    assert pace.too_long(64) is None  # 30 + 7 x 10
    assert pace.too_long(65) == "it would take about 101 s, and 100 s of the budget are left"
    assert pace.too_long(128, share=0.5) is None


def test_report(field, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "field_of", lambda *_: (field, "reason"))
    monkeypatch.setattr(compare, "memory_limit", lambda: 2**30)
    programs.fits = {"deit": 1}
    seconds = []
    report = compare.compare(
        "vim_tiny", TOP, SIZES, file=tmp_path / "a.json", about={"config": "x"}, sizes=(1, 8), seconds=1e6,
        advance=seconds.append,
    )  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text()) == report
    assert report["finished"] and report["config"] == "x" and report["dtype"] == "float32"
    wanted = (
        "load_average",
        "device",
        "driver",
        "packages",
        "date",
        "method",
        "budget_s",
        "memory_limit_mib",
        "judged_by",
        "seconds",
    )
    assert report.keys() >= set(wanted)
    hold = report["contestants"][1]
    assert hold["tokens_per_block"] == [5, 3] and hold["gmacs"].keys() >= {"published", "all_directions"}
    largest = {row["contestant"]: (row["batch"], row["out_of_memory_at"]) for row in report["largest_batch"]}
    assert largest["deit"] == (1, 8) and largest[DENSE] == (8, None)
    shown = text(report)
    assert "Skipped: deit: reason." in shown
    assert "inference, deit: 1 fits, 8 does not." in shown and "Budget: 1000000 s and 1024 MiB for a program" in shown
    assert all(f"\n| {row['contestant']} " in shown for row in report["contestants"])
    assert shown.index("Where pruning does not pay:") > shown.index("times dense")
    assert sum(seconds) <= report["seconds"]


def test_a_file_that_cannot_be_written_costs_no_time(field, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "field_of", lambda *_: (field, None))
    with pytest.raises(InputError, match="cannot be written"):
        compare.compare("vim_tiny", TOP, SIZES, file=tmp_path / "no" / "a.json", seconds=1.0)
    assert not programs.compiled


@pytest.mark.parametrize("texts", [[], ["8", ""], ["0"], ["-1"], ["1.5"], ["eight"]])
def test_batch_sizes_that_are_none(texts):
    with pytest.raises(InputError, match="needed: whole numbers from 1, such as 1,8,32"):
        compare.batch_sizes(texts)
    assert compare.batch_sizes(["32", "8", "8"]) == (8, 32)


def test_memory_limit():
    limit = race.memory_limit()
    assert limit is None or 2**20 < limit < 2**50
