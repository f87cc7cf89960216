"""evaluate, convert and doctor: what they print, write and refuse."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import top_jax
from top_jax.training.checkpoints import load_checkpoint

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 10}
OVERRIDES = [f"--override={name}={value}" for name, value in SIZES.items()]


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
    assert "is no run directory: it has no config.json" in refused("evaluate", TINY, f"--checkpoint={tmp_path}")
    assert "nowhere does not exist; pass a run directory" in refused("evaluate", TINY, "--checkpoint=nowhere")
    assert "8 parameters differ, such as blocks.0" in refused("evaluate", TINY, checkpoint, "--config.model.d_state=8")
    folder = tmp_path / "data" / "test" / "cat"
    folder.mkdir(parents=True)
    shutil.copyfile(run / "config.json", folder / "a.jpg")  # no JPEG, but nothing looks that far
    images = ("--config.data.source=image_folder", f"--config.data.data_dir={tmp_path}/data")
    message = refused("evaluate", TINY, checkpoint, "--config.model.num_classes=1", *images)
    assert message == (
        f"checkpoint {run} is of a model with 10 classes, and this one has 1; use data of as many classes, or another "
        "checkpoint."
    )
    assert not (run / "evaluation.json").exists()


@pytest.fixture
def official_file(tmp_path):
    """A .pth file as the authors write them: EMA weights beside the plain ones."""
    torch = pytest.importorskip("torch")
    from top_jax.convert.keys import vim_keys

    model = top_jax.create_model("vim_tiny", rngs=nnx.Rngs(5), **SIZES)
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    weights = {key.torch: torch.tensor(key.layout.to_torch(np.asarray(params[key.ours][...]))) for key in vim_keys(2)}
    averaged = {name: value / 2 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": averaged, "epoch": 3}, tmp_path / "vim.pth")
    return tmp_path / "vim.pth"


def assert_same_weights(got, expected):
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (got, expected)))


@pytest.mark.torch
@pytest.mark.parametrize("ema", [False, True])
def test_convert(command, refused, official_file, tmp_path, ema):
    target = tmp_path / "converted"
    flags = ["--model=vim_tiny", *OVERRIDES, *(["--ema"] if ema else [])]
    result = command("convert", str(official_file), str(target), *flags)
    assert result.status == 0 and "python -m top_jax.cli.evaluate " in result.out
    report = json.loads((target / "conversion.json").read_text())
    assert report["ema"] is ema and report["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(load_checkpoint(target), nnx.Param))
    )
    expected = top_jax.load_torch_checkpoint(official_file, "vim_tiny", ema=ema, **SIZES)
    for which in ("best", "latest"):
        assert_same_weights(load_checkpoint(target, which), expected)
    used = refused("convert", str(official_file), str(target), *flags)
    assert used == f"{target} already holds checkpoints; choose another directory, or delete that one."


@pytest.mark.torch
def test_evaluate_an_official_file(command, official_file, tmp_path):
    """And its conversion: the same numbers."""
    result = command("evaluate", TINY, f"--checkpoint={official_file}")
    assert result.status == 0 and json.loads(result.out) == json.loads((tmp_path / "vim.evaluation.json").read_text())
    command("convert", str(official_file), str(tmp_path / "converted"), "--model=vim_tiny", *OVERRIDES)
    converted = json.loads(command("evaluate", TINY, f"--checkpoint={tmp_path}/converted").out)
    for name in ("accuracy", "accuracy_top5", "loss", "images"):
        assert converted[name] == json.loads(result.out)[name]


@pytest.mark.torch
def test_convert_refuses_weights_that_do_not_fit(refused, official_file, tmp_path):
    arguments = ("convert", str(official_file), str(tmp_path / "converted"), "--model=vim_tiny", *OVERRIDES)
    assert "head.weight (10, 16) instead of (7, 16)" in refused(*arguments, "--override=num_classes=7")
    assert "missing (layers.2." in refused(*arguments, "--override=depth=3")
    assert not (tmp_path / "converted").exists()


def test_convert_refuses(refused, tmp_path):
    target = str(tmp_path / "converted")
    needed = "needed: SOURCE.pth and the TARGET directory (--help)."
    assert refused("convert", "--model=vim_tiny") == f"got 0 arguments; {needed}"
    assert refused("convert", "a.pth", "b", "c", "--model=vim_tiny") == f"got 3 arguments; {needed}"
    assert "Flag --model must have a value" in refused("convert", "a.pth", target)
    assert "needed: key=value" in refused("convert", "a.pth", target, "--model=vim_tiny", "--override=depth")
    assert "unknown config key config.model.depht" in refused(
        "convert", "a.pth", target, "--model=vim_tiny", "--override=depht=3"
    )
    assert "config.model.depth='three' has type str" in refused(
        "convert", "a.pth", target, "--model=vim_tiny", "--override=depth=three"
    )
    message = refused("convert", str(tmp_path / "nowhere.pth"), target, "--model=vim_tiny")
    assert message == f"checkpoint {tmp_path}/nowhere.pth does not exist; pass the path of a .pth file."
    assert not Path(target).exists()


def test_doctor(command, tmp_path):
    result = command("doctor", "--data", TINY, f"--json={tmp_path}/doctor.json")
    assert result.status == 0
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "doctor.json").read_text())
    assert report["packages"]["jax"] == jax.__version__ and report["devices"]
    scan = report["selective_scan"]
    assert scan["implementations"][scan["auto"]] == "runs here" and scan["why"]
    assert scan["implementations"]["triton"] == "runs here" or "NVIDIA GPU" in scan["implementations"]["triton"]
    assert report["data"]["train"]["images"] == 1437 and report["data"]["eval"]["images"] == 360
    assert report["data"]["eval"]["first_images"] == [8, 8, 8, 3]


def test_doctor_refuses(refused):
    message = refused("doctor", "--data", "--config=configs/vim_cifar10.py", "--config.data.data_dir=/nowhere")
    assert message.startswith("data_dir /nowhere does not exist.")


def test_doctor_cannot_write(command, tmp_path):
    (tmp_path / "file").write_text("")
    result = command("doctor", f"--json={tmp_path}/file/doctor.json")
    assert result.status == 2 and json.loads(result.out)  # it has told, at least
    assert result.err.endswith("cannot be written (Not a directory); choose another with --json.\n")
    assert result.err.count("\n") == 1
