"""evaluate: what it prints, writes and refuses."""

import json
import shutil
from pathlib import Path

import pytest

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_evaluate_a_run(command, run):
    """The numbers of the run itself: `latest` is what its last evaluation saw."""
    summary = json.loads((run / "summary.json").read_text())
    result = command("evaluate", TINY, f"--checkpoint={run}", "--which=latest")
    assert result.status == 0
    printed = json.loads(result.out)
    assert printed == json.loads((run / "evaluation.json").read_text())
    assert printed["accuracy"] == pytest.approx(summary["ema_accuracy"], abs=1e-9)  # averaged weights, by default
    assert printed["loss"] == pytest.approx(summary["ema_loss"], rel=1e-5)
    assert (printed["images"], printed["unreadable"]) == (360, 0)
    assert printed["tokens_per_block"] == [5, 3] and printed["gmacs"] == summary["gmacs"]
    assert printed["dense_gmacs"]["published"] > printed["gmacs"]["published"]


def test_evaluate_options(command, run, tmp_path):
    """Plain weights, another batch size, other pruning, another file."""
    summary = json.loads((run / "summary.json").read_text())
    flags = (f"--checkpoint={run}", "--which=latest", "--noema", f"--json={tmp_path}/other.json")
    result = command("evaluate", TINY, *flags, "--config.eval_batch_size=77")
    assert json.loads(result.out)["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-9)
    assert (tmp_path / "other.json").is_file() and not (run / "evaluation.json").exists()
    dense = json.loads(command("evaluate", TINY, *flags, "--config.pruning.after_blocks=()").out)
    assert dense["tokens_per_block"] == [5, 5] and dense["gmacs"] == dense["dense_gmacs"]


def test_evaluate_refuses(refused, run, tmp_path):
    checkpoint = f"--checkpoint={run}"
    assert "Flag --checkpoint must have a value" in refused("evaluate", TINY)
    assert "config.json" in refused("evaluate", TINY, f"--checkpoint={tmp_path}")
    assert "nowhere" in refused("evaluate", TINY, "--checkpoint=nowhere")
    assert "blocks.0" in refused("evaluate", TINY, checkpoint, "--config.model.d_state=8")
    folder = tmp_path / "data" / "test" / "cat"
    folder.mkdir(parents=True)
    shutil.copyfile(run / "config.json", folder / "a.jpg")  # no JPEG, but nothing looks that far
    images = ("--config.data.source=image_folder", f"--config.data.data_dir={tmp_path}/data")
    message = refused("evaluate", TINY, checkpoint, "--config.model.num_classes=1", *images)
    assert str(run) in message and "10 classes" in message and "has 1;" in message
    assert not (run / "evaluation.json").exists()


@pytest.mark.torch
def test_evaluate_an_official_file(command, official_file, overrides, tmp_path):
    """And its conversion: the same numbers."""
    result = command("evaluate", TINY, f"--checkpoint={official_file}")
    assert result.status == 0 and json.loads(result.out) == json.loads(
        (tmp_path / "vim.pth.evaluation.json").read_text()
    )
    command("convert", str(official_file), str(tmp_path / "converted"), "--model=vim_tiny", *overrides)
    converted = json.loads(command("evaluate", TINY, f"--checkpoint={tmp_path}/converted").out)
    for name in ("accuracy", "accuracy_top5", "loss", "images"):
        assert converted[name] == json.loads(result.out)[name]
