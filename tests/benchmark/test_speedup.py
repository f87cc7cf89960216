"""Speed-ups and what is said of them, on times made up for it."""

import pytest

from top_jax.benchmark.speedup import (
    LITTLE,
    NO_GAIN,
    PAYS,
    SLOWER,
    Spread,
    conclusions,
    judged_by,
    macs_ratios,
    paired_speedup,
    verdict,
)


def test_ratios_are_of_the_same_round():
    """A slow spell that hits both leaves the ratio; medians of each alone would not tell 2."""
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
        (Spread(1.1, 1.05, 1.14), 4 / 3, LITTLE),  # of a quarter promised, at most 12.3 % of the time is saved
        (Spread(1.1, 1.05, 1.15), 4 / 3, PAYS),  # 13.0 %
        (Spread(1.01, 1.005, 1.02), 1.0, PAYS),  # nothing was promised
    ],
)
def test_verdict(speedup, macs_ratio, expected):
    assert verdict(speedup, macs_ratio) == expected


def test_macs_ratios_and_the_convention_that_judges():
    dense, own = {"published": 30, "all_directions": 40}, {"published": 20, "all_directions": 20}
    assert macs_ratios(dense, own) == {"published": 1.5, "all_directions": 2.0}
    assert judged_by(own) == "published" and judged_by({**own, "executed": 1}) == "executed"


def row(batch, name, median, found):
    return {
        "pass": "inference", "batch": batch, "contestant": name, "speedup": median,
        "speedup_quartiles": [median - 0.1, median + 0.1], "verdict": found, "macs_ratio": {"published": 1.5},
    }  # fmt: skip


def test_conclusions():
    rows = [
        {"pass": "inference", "batch": 1, "contestant": "dense"},
        row(1, "hold", 0.8, SLOWER),
        row(1, "decay", 0.7, SLOWER),
        row(8, "hold", 1.2, LITTLE),
        row(8, "decay", 1.5, PAYS),
    ]
    assert conclusions(rows) == [
        "inference, batch 1: slower than dense: hold at 0.80 times the dense speed (0.70 .. 0.90; published 1.50); "
        "decay at 0.70 times the dense speed (0.60 .. 0.80; published 1.50).",
        "inference, batch 8: faster, but by less than half of the time that the multiply-accumulates promise: hold at "
        "1.20 times the dense speed (1.10 .. 1.30; published 1.50).",
    ]
    assert conclusions(rows[-1:]) == ["Nowhere: it pays in all that was measured here."]
    assert conclusions(rows[:1]) == []
