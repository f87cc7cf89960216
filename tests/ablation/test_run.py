"""An ablation from checkpoints to files: right numbers, nothing twice, nothing mixed."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from top_jax.ablation import Finetune
from top_jax.ablation.evaluate import EvaluationImages
from top_jax.ablation.results import Results, common_settings, result_of_images
from top_jax.ablation.run import config_of
from top_jax.build import build_abstract_model
from top_jax.data import open_source
from top_jax.errors import InputError
from top_jax.evaluation.accuracy import evaluate_model
from top_jax.pruning import Pruning
from top_jax.training.saved_weights import find_weights
from top_jax.training.weights import fill

BASE = Pruning(after_blocks=(1,), keep_ratio=0.5)


@pytest.fixture
def rows(finished):
    return json.loads((finished.out / "results.json").read_text())["rows"]


def settings_of(row):
    return {name: row[name] for name in ("alignment", "order", "score", "random_seed")}


@pytest.mark.parametrize(
    "setting",
    [
        dataclasses.replace(BASE, alignment="none", order="score"),
        dataclasses.replace(BASE, score="random", seed=1),
    ],
)
def test_numbers_are_those_of_evaluate(finished, rows, setting):
    """The same as of a model built with the setting, in a program of its own."""
    checkpoint = finished.checkpoints[1]
    shapes = build_abstract_model(finished.config.model, setting)
    model = fill(shapes, find_weights(checkpoint).for_model(finished.config.model))
    source = open_source(finished.config.data, train=False)
    expected = evaluate_model(model, source, finished.config.data, batch_size=180)
    seed = setting.seed if setting.score == "random" else None
    wanted = {"alignment": setting.alignment, "order": setting.order, "score": setting.score, "random_seed": seed}
    (row,) = (r for r in rows if settings_of(r) == wanted and r["checkpoint"] == str(checkpoint))
    assert row["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (row["images"], row["left_out"]) == (360, [])
    assert row["seed"] == 1 and not row["trained_pruned"]


def test_every_setting_once_and_all_different(finished, rows):
    """7 settings on 2 checkpoints, all with different numbers."""
    assert len(rows) == 2 * (1 + 2 + 1 + 1 + 2)
    assert len({row["loss"] for row in rows}) == len(rows)
    assert rows[0]["tokens_per_block"] == [5, 5] and rows[-1]["tokens_per_block"] == [5, 3]
    assert rows[0]["gmacs"]["published"] > rows[-1]["gmacs"]["published"]


def test_files(finished, rows):
    lines = [json.loads(line) for line in (finished.out / "results.jsonl").read_text().splitlines()]
    assert [{**line, "correct_bits": None} for line in lines] == [{**row, "correct_bits": None} for row in rows]
    with np.load(finished.out / "correctness.npz") as found:
        np.testing.assert_array_equal(found["index"], np.arange(360))
        correct = np.unpackbits(found["correct"], axis=1, count=360)
        assert correct.sum(axis=1).tolist() == [row["correct"] for row in rows]
        np.testing.assert_array_equal(correct[3], result_of_images(lines[3]))
    tables = (finished.out / "tables.md").read_text()
    assert "## Alignment, without training" in tables and "## Score, without training" in tables
    assert "vim_tiny on digits/test, 360 images" in tables and str(finished.checkpoints[0]) in tables
    with (finished.out / "tables.csv").open() as file:
        by_score = {line["score"]: line for line in csv.DictReader(file) if line["table"] == "score"}
    assert by_score["random"]["runs"] == "4" and by_score["clip"]["runs"] == by_score["clip"]["checkpoints"] == "2"
    assert (finished.out / "accuracy_vs_gflops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_kill_costs_what_was_being_done(finished, tmp_path, monkeypatch):
    """The last line is cut short: that row is done again, the others are not, and the numbers are the same."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    first, *others = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join([*others, first[:-40]]))
    finished.said.clear()
    finished.run(out=out)
    assert finished.said[1:] == [
        f"dense: accuracy {json.loads(first)['accuracy']:.2%} on 360 images, {finished.checkpoints[0]}"
    ]
    assert (out / "results.jsonl").read_text() == "".join([*others, first])

    monkeypatch.setattr("top_jax.ablation.run.Program", None)  # now nothing is left to compile
    finished.said.clear()
    assert len(finished.run(out=out)) == 14
    assert len(finished.said) == 1 and finished.said[0].startswith("7 settings x 2 checkpoints")
    assert "360 images" in finished.said[0] and "14 results" in finished.said[0]


def test_refuses_results_of_other_settings(finished, config, tmp_path):
    before = (finished.out / "results.jsonl").read_bytes()

    def opened(out=finished.out, limit=None, config=config, base=finished.base, trains=False):
        return Results(out, common_settings(config, base, limit, trains))

    with pytest.raises(InputError, match=rf"{finished.out} .*limit_images None there, 50 here"):
        opened(limit=50)
    data = dataclasses.replace(config.data, mean=(0.0, 0.0, 0.0))
    with pytest.raises(InputError, match=r"data.mean \[0.485, 0.456, 0.406\] there, \[0.0, 0.0, 0.0\] here"):
        opened(config=dataclasses.replace(config, data=data))
    with pytest.raises(InputError, match=r"base.keep_ratio 0.5 there, 0.7 here"):
        opened(base=dataclasses.replace(BASE, keep_ratio=0.7))
    assert (finished.out / "results.jsonl").read_bytes() == before
    results = opened()
    results.check_weights("elsewhere", 3)
    first = results.rows[0]
    results.check_weights(first["checkpoint"], first["weights"])
    with pytest.raises(InputError, match=r"other weights of .*/seed0"):
        results.check_weights(first["checkpoint"], 3)

    results.close()

    out = shutil.copytree(finished.out, tmp_path / "out")
    faster = dataclasses.replace(config, batch_size=8)
    for settings in (dict(trains=True), dict(config=faster)):  # the latter trains nothing
        with opened(out, **settings) as held:
            assert len(held.rows) == 14
            with pytest.raises(InputError, match="in use"):
                opened(out)
    with pytest.raises(InputError, match=r"training.batch_size 16 there, 8 here"):
        opened(out, config=faster, trains=True)
    stored = json.loads((out / "settings.json").read_text())
    before = {key: value for key, value in stored.items() if key not in ("model.head", "data.scale", "data.shift")}
    (out / "settings.json").write_text(json.dumps(before))  # of a release without them; shift is not its default here
    with pytest.raises(InputError, match=r"\(data.shift 4 there, 1 here\)"):
        opened(out)
    (out / "settings.json").write_text(json.dumps({**before, "data.shift": 1}))
    with opened(out) as held:
        assert len(held.rows) == 14
    (out / "settings.json").unlink()
    with pytest.raises(InputError, match=r"settings\.json"):
        opened(out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"/file \(File exists\).*--out"):
        opened(tmp_path / "file")


def test_refuses_before_it_starts(finished, checkpoints, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=f"{checkpoints[0]} and {checkpoints[0]}"):
        finished.run([checkpoints[0], checkpoints[0]], out=out)
    with pytest.raises(InputError, match="prunes after block 2 of 2"):
        finished.run(grid=[Pruning(after_blocks=(2,), keep_ratio=0.5)], out=out)
    with pytest.raises(InputError, match=r"limit_images=361; needed: 1 .. 360"):
        finished.run(limit_images=361, out=out)
    with pytest.raises(InputError, match="leave out --which and --ema"):
        finished.run(finetune=Finetune(1), which="latest", out=out)
    with pytest.raises(InputError, match=r"finetune_seeds=\[1, 1\]"):
        Finetune(3, seeds=(1, 1))
    assert not out.exists()


def test_images_are_read_once_where_they_fit(config, monkeypatch):
    reads = []
    source = open_source(config.data, train=False)
    read = type(source).__getitem__

    def counting(self, index):
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(type(source), "__getitem__", counting)
    make = lambda: EvaluationImages(source, config.data, img_size=(8, 8), batch_size=16, limit=20)  # noqa: E731
    images = make()
    first, second = ([np.asarray(batch["index"]).tolist() for batch in images] for _ in range(2))
    assert first == second == [list(range(16)), [*range(16, 20), *[-1] * 12]]
    assert sorted(reads) == list(range(20)) and images.held
    monkeypatch.setattr("top_jax.ablation.evaluate.HELD_BYTES", 32 * 8 * 8 * 3)  # the pixels of both batches alone
    reads.clear()
    images = make()
    assert [len(list(images)) for _ in range(2)] == [2, 2] and not images.held
    assert sorted(reads) == sorted([*range(20)] * 2)


def test_how_a_setting_is_fine_tuned(config):
    tuned = config_of(config, "runs/a", dataclasses.replace(BASE, score="random", seed=2), Finetune(7), seed=5)
    assert (tuned.seed, tuned.init_from, tuned.total_steps) == (5, "runs/a", 7)
    assert tuned.pruning.settings() == {
        "method": "top",
        "after_blocks": (1,),
        "keep_ratio": 0.5,
        "score": "random",
        "alignment": "hold",
        "order": "position",
        "seed": 2,
    }
    assert tuned.optimizer.learning_rate == pytest.approx(config.optimizer.learning_rate / 10)
    assert tuned.optimizer.ema_decay is None and tuned.data == config.data
    slow = config_of(config, "runs/a", Pruning(), Finetune(7, 1e-7), seed=0)
    assert slow.optimizer.min_learning_rate == slow.optimizer.warmup_learning_rate == 1e-7
    assert slow.pruning.after_blocks == ()


@pytest.mark.slow  # three programs of training
def test_fine_tuning(finished, tmp_path, capsys):
    """One step of it changes the numbers; the same command again trains nothing; the untrained rows stay."""
    out, one = shutil.copytree(finished.out, tmp_path / "out"), [finished.checkpoints[0]]
    grid, finetune = [dataclasses.replace(BASE, alignment="none", order="score")], Finetune(2, 1e-2)
    rows = finished.run(one, grid=grid, out=out, finetune=finetune)
    tuned = [row for row in rows if row["finetuned"]]
    assert len(rows) == 14 + 2 and [row["alignment"] for row in tuned] == [None, "none"]
    untuned = {(row["weights"], str(settings_of(row))): row for row in rows if not row["finetuned"]}
    for row in tuned:
        assert row["loss"] != untuned[row["weights"], str(settings_of(row))]["loss"]
        assert (out / row["finetuned"]["run"] / "summary.json").is_file()
        summary = json.loads((out / row["finetuned"]["run"] / "summary.json").read_text())
        assert row["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-9) and summary["steps"] == 2
    assert "after 2 steps at 0.01" in (out / "tables.md").read_text()
    finished.said.clear()
    assert finished.run(one, grid=grid, out=out, finetune=finetune) == rows and len(finished.said) == 1
    assert len(finished.run(one, grid=grid, out=out)) == 16
