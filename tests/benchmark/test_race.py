"""Real races of small models: growing batch sizes, limits of memory and time, speed-ups and verdicts."""

import itertools
import time

import pytest

from top_jax.benchmark.contestants import DENSE
from top_jax.benchmark.programs import BOTH_PASSES, INFERENCE, TRAIN_STEP
from top_jax.benchmark.race import (
    LEAST_ROUNDS,
    LITTLE,
    NO_GAIN,
    PAYS,
    SLOWER,
    Pace,
    Race,
    growing,
    macs_ratios,
    memory_limit,
    paired_speedup,
    verdict,
)
from top_jax.benchmark.timing import Spread
from top_jax.memory import out_of_memory

pytestmark = pytest.mark.slow

PRUNED = "top hold (config)"


def run(field, sizes, *, seconds=1e6, memory=None, passes=(INFERENCE,)):
    race, saved = Race(field, seconds, memory=memory, workers=2), []
    race.run(passes, sizes, lambda: saved.append(len(race.rows)))
    assert saved == sorted(saved) and saved[-1] == len(race.rows)  # the report is saved after every batch size
    return race


def sizes_of(race, name):
    return [row["batch"] for row in race.rows if row["contestant"] == name and "error" not in row]


def test_sizes_grow():
    assert list(itertools.islice(growing(), 6)) == [1, 8, 32, 64, 128, 256]


@pytest.fixture(scope="module")
def unlimited(field):
    return run(field, lambda: (1, 8, 32))


def test_rows(field, unlimited):
    assert [(row["batch"], row["contestant"]) for row in unlimited.rows] == [
        (batch, contestant.name) for batch in (1, 8, 32) for contestant in field
    ]
    assert not unlimited.skipped
    for row in unlimited.rows:
        assert len(row["times_ms"]) == row["rounds"] >= LEAST_ROUNDS and row["images_per_s"] > 0
        assert row["program_mib"] > 0 and row["compile_s"] >= 0
        assert ("speedup" in row) == (row["contestant"] != DENSE)
        assert ("verdict" in row) == (row["contestant"] == PRUNED)
    pruned = unlimited.rows[1]
    assert pruned["macs_ratio"]["published"] > 1
    assert pruned["speedup_quartiles"][0] <= pruned["speedup"] <= pruned["speedup_quartiles"][1]


def test_up_to_the_largest_that_fits(field, unlimited):
    """Each leaves where its program needs more than the limit; the dense model ends the race."""
    needed = {(row["contestant"], row["batch"]): row["program_mib"] for row in unlimited.rows}
    limit = (needed[DENSE, 8] + needed[DENSE, 32]) / 2
    assert needed["large", 1] > limit > needed[PRUNED, 8]
    race = run(field, growing, memory=int(limit * 2**20))
    assert sizes_of(race, DENSE) == [1, 8] and sizes_of(race, "large") == []
    failed = {(row["contestant"], row["batch"]): row for row in race.rows if "error" in row}
    assert {("large", 1), (DENSE, 32)} <= failed.keys() and all(row["out_of_memory"] for row in failed.values())
    assert f"{limit:.1f} MiB" in failed["large", 1]["error"]
    alone = [row for row in race.rows if row["contestant"] == PRUNED and row["batch"] == 32 and "error" not in row]
    assert not any("speedup" in row or "verdict" in row for row in alone)  # there is nothing to compare it with
    (rest,) = race.skipped
    assert (rest["batch"], rest["and_larger"]) == (64, True) and "dense model" in rest["reason"]


def test_images_that_do_not_fit(field, monkeypatch):
    def refuse(model, batch, img_size):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("top_jax.benchmark.race.make_batches", refuse)
    race = run(field[:1], growing)
    (skipped,) = race.skipped
    assert not race.rows and "images alone" in skipped["reason"]


def test_without_time_the_first_two_run(field):
    race = run(field, growing, seconds=0.0)
    assert [row["contestant"] for row in race.rows] == [DENSE, PRUNED]
    assert [row["rounds"] for row in race.rows] == [LEAST_ROUNDS] * 2
    assert [(row["batch"], row["and_larger"]) for row in race.skipped] == [(1, False), (8, True)]
    assert race.skipped[0]["contestants"] == ["large"] and race.skipped[1]["contestants"] == [c.name for c in field]
    assert all("0 s of the budget" in row["reason"] for row in race.skipped)


def test_the_train_step_has_its_share(field):
    race = run(field[:2], lambda: (2,), passes=BOTH_PASSES)
    assert [row["pass"] for row in race.rows] == [INFERENCE] * 2 + [TRAIN_STEP] * 2 and not race.skipped
    assert all(row["images_per_s"] > 0 for row in race.rows)
    assert [row["contestant"] for row in race.rows if "verdict" in row] == [PRUNED] * 2


def test_time_is_predicted():
    pace = Pace(end=time.perf_counter() + 1000, group=0.0)
    assert pace.too_long(10**9) is None  # nothing is known
    pace.group, pace.image = 300.0, 12.5 / 8
    assert pace.too_long(60) is None  # 300 + 7 x 12.5 x 60 / 8 = 956
    reason = pace.too_long(65)
    assert reason is not None and "about 1011 s" in reason
    assert pace.too_long(120, share=0.5) is None


def test_memory():
    limit = memory_limit()
    assert limit is None or 2**20 < limit < 2**50
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: no"))
    assert not out_of_memory(RuntimeError("no launch"))


def test_ratios_are_of_the_same_round():
    """A slow spell that hits both leaves the ratio; the medians of each alone would not give 2."""
    dense, pruned = [1.0, 1.0, 8.0, 8.0, 8.0], [0.5, 0.5, 4.0, 4.0, 2.0]
    assert paired_speedup(dense, pruned) == Spread(2.0, 2.0, 2.0)
    assert paired_speedup([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == Spread(2.0, 1.5, 2.5)
    with pytest.raises(ValueError, match="shorter"):
        paired_speedup(dense, pruned[1:])


@pytest.mark.parametrize(
    "speedup, macs_ratio, expected",
    [
        (Spread(0.8, 0.7, 0.99), 1.5, SLOWER),
        (Spread(0.9, 0.8, 1.0), 1.5, NO_GAIN),
        (Spread(1.4, 1.0, 1.5), 1.5, NO_GAIN),
        (Spread(1.1, 1.05, 1.14), 4 / 3, LITTLE),  # of a quarter predicted, at most 12.3 % of the time is saved
        (Spread(1.1, 1.05, 1.15), 4 / 3, PAYS),  # 13.0 %
        (Spread(1.01, 1.005, 1.02), 1.0, PAYS),  # nothing was predicted
    ],
)
def test_verdict(speedup, macs_ratio, expected):
    assert verdict(speedup, macs_ratio) == expected


def test_macs_ratios():
    dense, own = {"published": 30, "all_directions": 40}, {"published": 20, "all_directions": 20}
    assert macs_ratios(dense, own) == {"published": 1.5, "all_directions": 2.0}
