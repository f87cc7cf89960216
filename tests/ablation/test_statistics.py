"""Means, errors, pairs and tables of made-up rows, against numbers worked out by hand."""

import csv
import io
import math
import re

import numpy as np
import pytest
from matplotlib.image import imread

from top_jax.ablation import compare, summarise
from top_jax.ablation.picture import draw
from top_jax.ablation.results import result_of_images, row_key, setting_fields, to_bits
from top_jax.ablation.statistics import mcnemar
from top_jax.ablation.tables import arrange, as_csv, markdown, name_of
from top_jax.pruning import Pruning

BASE = {"after_blocks": [1], "keep_ratio": 0.5, "alignment": "hold", "order": "position", "score": "clip"}
DENSE = Pruning()
HOLD = Pruning(after_blocks=(1,), keep_ratio=0.5)
NAIVE = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="none", order="score")


def random(seed):
    return Pruning(after_blocks=(1,), keep_ratio=0.5, score="random", seed=seed)


def row(setting, correct, weights=1, finetuned=None):
    bits = np.array([int(c) for c in correct], bool)
    return {
        "checkpoint": f"runs/{weights}",
        "weights": weights,
        "seed": weights,
        "trained_pruned": False,
        **setting_fields(setting),
        "finetuned": finetuned,
        "tokens_per_block": [5, 3] if setting.after_blocks else [5, 5],
        "gmacs": {"published": 0.5 if setting.after_blocks else 1.0, "all_directions": 2.0},
        "accuracy": float(bits.mean()),
        "correct": int(bits.sum()),
        "images": len(bits),
        "loss": 1.0,
        "left_out": [],
        "correct_bits": to_bits(bits),
    }


ROWS = [
    row(DENSE, "1111111100"),
    row(DENSE, "1111110000", weights=2),
    row(NAIVE, "1100000011"),
    row(HOLD, "1111110010"),
    row(HOLD, "1111100000", weights=2),
    row(random(0), "1111000000"),
    row(random(1), "1111110000"),
    row(random(0), "1100000000", weights=2),
    row(random(1), "1110000000", weights=2),
]


@pytest.fixture(scope="module")
def cells():
    return {name_of(cell): cell for cell in summarise(ROWS)}


@pytest.mark.parametrize("images", [1, 8, 13])
def test_bits_come_back(images):
    correct = np.random.default_rng(0).random(images) < 0.5
    text = {"correct_bits": to_bits(correct), "images": images}
    np.testing.assert_array_equal(result_of_images(text), correct)


def test_one_run_has_the_binomial_error(cells):
    naive = cells["none, score order, clip, keep 0.5"]
    assert (naive.runs, naive.checkpoints, naive.images) == (1, 1, 10)
    assert naive.accuracy.mean == pytest.approx(0.4) and naive.accuracy.spread is None
    assert naive.accuracy.sampling_error == pytest.approx(math.sqrt(0.4 * 0.6 / 10))
    assert naive.drop.mean == pytest.approx(0.4)
    assert (naive.lost, naive.gained) == (6, 2)  # of the dense model of its own checkpoint


def test_spread_over_checkpoints_and_seeds(cells):
    hold, control = cells["hold, clip, keep 0.5"], cells["hold, random, keep 0.5"]
    assert hold.accuracy.mean == pytest.approx(0.6)
    assert hold.accuracy.spread == pytest.approx(np.std([0.7, 0.5], ddof=1))
    over_runs = np.array([1, 1, 1, 1, 1, 0.5, 0, 0, 0.5, 0])
    assert hold.accuracy.sampling_error == pytest.approx(over_runs.std() / math.sqrt(10))
    assert hold.drop.mean == pytest.approx(0.1) and hold.drop.spread == pytest.approx(0)  # paired: 0.1 of each
    assert (hold.lost, hold.gained) == (3, 1)
    assert (control.runs, control.checkpoints) == (4, 2)
    assert control.accuracy.mean == pytest.approx(np.mean([0.4, 0.6, 0.2, 0.3]))
    assert control.accuracy.spread == pytest.approx(np.std([0.4, 0.6, 0.2, 0.3], ddof=1))


def test_the_dense_model_has_no_drop(cells):
    assert cells["dense"].drop is None and cells["dense"].accuracy.mean == pytest.approx(0.7)
    (alone,) = summarise([row(HOLD, "10", weights=7)])  # nor has one whose dense model is not there
    assert alone.drop is None


def test_fine_tuned_rows_are_their_own(cells):
    tuned = {"steps": 5, "learning_rate": 0.1, "seed": 0, "run": "runs/x"}
    rows = [*ROWS, row(DENSE, "1110000000", finetuned=tuned), row(HOLD, "1111100000", finetuned=tuned)]
    of_both = [cell for cell in summarise(rows) if name_of(cell) == "hold, clip, keep 0.5"]
    assert of_both[0] == cells["hold, clip, keep 0.5"]
    assert of_both[1].finetuned == (5, 0.1)
    assert of_both[1].drop.mean == pytest.approx(-0.2)  # against the dense model that was trained as long
    assert row_key(rows[-1]) != row_key(rows[3])
    titles = [table.title for table in arrange(summarise(rows), BASE)]
    assert "Alignment, without training" in titles and "All settings, after 5 steps at 0.1" in titles


def test_pairs(cells):
    pair = compare(ROWS, cells["none, score order, clip, keep 0.5"], cells["hold, clip, keep 0.5"])
    assert (pair.only_this, pair.only_reference, pair.pairs) == (1, 4, 1)
    assert pair.difference.mean == pytest.approx(-0.3)
    assert pair.p_value == pytest.approx(0.375)
    several = compare(ROWS, cells["hold, random, keep 0.5"], cells["hold, clip, keep 0.5"])
    assert (several.pairs, several.p_value) == (4, None)
    assert (several.only_this, several.only_reference) == (0, 3 + 1 + 3 + 2)
    assert several.difference.mean == pytest.approx(-0.9 / 4)
    other = summarise([row(HOLD, "10", weights=7)])[0]
    assert compare([row(HOLD, "10", weights=7)], other, cells["dense"]) is None


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 3), (1, 4), (0, 12), (130, 171), (171, 130), (40, 2000)])
def test_mcnemar_counts_fair_coins(one, other):
    """The share of the outcomes of one coin per differing image that are at least as uneven."""
    coins = one + other
    outcomes = sum(math.comb(coins, heads) for heads in range(min(one, other) + 1))
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * outcomes / 2**coins), rel=1e-6, abs=1e-300)


def test_tables(cells):
    tables = {table.name: table for table in arrange(cells.values(), BASE)}
    assert list(tables) == ["alignment", "score"]  # a single keep ratio makes no curve
    assert [name_of(cell) for cell in tables["alignment"].cells] == [
        "dense",
        "none, score order, clip, keep 0.5",
        "hold, clip, keep 0.5",
    ]
    text = re.sub(" +", " ", markdown(tables.values(), ROWS, "about"))
    assert "| none | score | clip | 0.5 | 5 > 3 | 0.5 | 40.00 se 15.49 | 40.00 se 25.30 | 6 / 2 | 1 (1) | 10 |" in text
    assert "| hold, random, keep 0.5 | -22.50 sd 9.57 se " in text
    assert "| none, score order, clip, keep 0.5 | -30.00 se 20.25 | 1 | 4 | 1 | 0.375 |" in text
    lines = list(csv.DictReader(io.StringIO(as_csv(tables.values()))))
    assert len(lines) == 3 + 3
    assert lines[1]["table"] == "alignment" and lines[1]["order"] == "score" and lines[1]["accuracy_sd"] == ""
    assert float(lines[2]["drop_sd"]) == pytest.approx(0, abs=1e-12) and lines[2]["after_blocks"] == "1"


def test_what_no_table_holds_is_in_the_last(cells):
    l1 = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="none", score="l1")
    tables = arrange(summarise([*ROWS, row(l1, "1000000000")]), BASE)
    assert tables[-1].name == "all" and "none, l1, keep 0.5" in [name_of(cell) for cell in tables[-1].cells]


def test_picture(cells, tmp_path):
    """Every alignment's colour is there, and a row of panels for each training."""
    draw(list(cells.values()), BASE, tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")[:, :, :3]
    for colour in ((0, 0, 0), (0xD5, 0x5E, 0), (0, 0x72, 0xB2)):
        assert (np.abs(pixels - np.array(colour) / 255) < 0.01).all(axis=-1).any()
    assert not (np.abs(pixels - np.array((0, 0x9E, 0x73)) / 255) < 0.01).all(axis=-1).any()  # decay is not
    tuned = {"steps": 5, "learning_rate": 0.1, "seed": 0, "run": "runs/x"}
    draw(summarise([*ROWS, row(DENSE, "1110000000", finetuned=tuned)]), BASE, tmp_path / "b.png")
    assert imread(tmp_path / "b.png").shape[0] > 1.5 * pixels.shape[0]
