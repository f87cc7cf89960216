"""evaluate: what it prints, writes and refuses."""

import errno
import gc
import json
import shutil
import signal
import sys
import time
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


@pytest.mark.slow
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
    assert "--checkpoint is missing" in refused("evaluate", TINY)
    assert "config.json" in refused("evaluate", TINY, f"--checkpoint={tmp_path}")
    assert "nowhere" in refused("evaluate", TINY, "--checkpoint=nowhere")
    assert "blocks.0" in refused("evaluate", TINY, checkpoint, "--config.model.d_state=8")
    folder = tmp_path / "data" / "test" / "cat"
    folder.mkdir(parents=True)
    shutil.copyfile(run / "config.json", folder / "a.jpg")  # no JPEG, but nothing looks that far
    images = ("--config.data.source=image_folder", f"--config.data.data_dir={tmp_path}/data")
    message = refused("evaluate", TINY, checkpoint, "--config.model.num_classes=1", *images)
    assert str(run) in message and "10 classes" in message
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


@pytest.mark.slow
def test_a_converted_run_needs_data(refused, command, run, tmp_path):
    """Its config holds default data settings: the digits, whatever the weights were trained on."""
    converted = tmp_path / "converted"
    shutil.copytree(run, converted, ignore=shutil.ignore_patterns("metrics.jsonl", "summary.json", "data.json"))
    for name in ("evaluate", "ablate"):
        out = [f"--out={tmp_path}/out"] if name == "ablate" else []
        assert str(converted) in refused(name, f"--checkpoint={converted}", *out)
    assert command("evaluate", f"--checkpoint={converted}", "--config.data.source=digits").status == 0


@pytest.fixture
def dense(run, tmp_path):
    """--config of the run without its pruning, as a user's own dense config leaves it out."""
    settings = json.loads((run / "config.json").read_text())
    settings["pruning"] |= {"after_blocks": [], "keep_ratio": []}
    text = f"from top_jax.config import make_config\n\ndef get_config():\n    return make_config(**{settings!r})\n"
    (tmp_path / "dense.py").write_text(text)
    return f"--config={tmp_path}/dense.py"


@pytest.mark.slow
def test_a_run_brings_its_own_config(command, run, caplog):
    """Without --config, and with the run's own: the pruned model, and nothing to warn of."""
    for config in ([], [f"--config={run}"], [f"--config={run}/config.json"]):
        result = command("evaluate", *config, f"--checkpoint={run}")
        assert (result.status, json.loads(result.out)["tokens_per_block"]) == (0, [5, 3])
        assert not caplog.records


def test_other_settings_than_the_run(command, run, caplog):
    """They win, and a warning names each key with both values."""
    changes = ("--config.pruning.keep_ratio=(0.75,)", "--config.data.eval_crop=0.9", "--config.eval_batch_size=77")
    result = command("evaluate", *changes, f"--checkpoint={run}")
    assert json.loads(result.out)["tokens_per_block"] == [5, 4]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "pruning.keep_ratio 0.5 -> 0.75" in warning and "data.eval_crop 1.0 -> 0.9" in warning
    assert "eval_batch_size" not in warning


@pytest.mark.parametrize("program", ["evaluate", "visualize", "export", "ablate"])
def test_a_pruned_run_is_never_dense_by_accident(refused, run, dense, tmp_path, program):
    arguments = {"visualize": ["--examples=1", f"--out={tmp_path}/v"], "export": [f"{tmp_path}/e"]}
    arguments["ablate"] = [f"--out={tmp_path}/a"]
    message = refused(program, dense, f"--checkpoint={run}", *arguments.get(program, []))
    assert "(1,)" in message and "--config.pruning.after_blocks=()" in message


def test_dense_by_choice(command, run, dense, caplog):
    result = command("evaluate", dense, f"--checkpoint={run}", "--config.pruning.after_blocks=()")
    assert json.loads(result.out)["tokens_per_block"] == [5, 5]
    assert "pruning.after_blocks (1,) -> ()" in caplog.text


def test_a_run_goes_on_by_its_folder(command, run, finished_run):
    """train.py, too, reads the config of the folder it is given; the run is complete already."""
    assert command("train.py", f"--workdir={run}").status == 0
    assert json.loads((run / "config.json").read_text()) == json.loads((finished_run / "config.json").read_text())


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'"), KeyError(0)])
def test_no_device(refused, monkeypatch, error):
    """JAX_PLATFORMS=cuda without a GPU: what is raised depends on JAX's version and on the place."""

    def fail(*_):
        raise AssertionError if isinstance(error, KeyError) else error

    def place(*_):
        raise error

    monkeypatch.setattr("jax.devices", fail)
    monkeypatch.setattr("top_jax.ops.implementations.choose", place)
    assert refused("doctor").startswith("JAX finds no device with JAX_PLATFORMS=")


def test_ctrl_c_in_a_callback_of_the_garbage_collector(command, monkeypatch):
    """Python drops an exception raised there (JAX has such a callback); the command ends all the same."""
    ended, hook = [], sys.unraisablehook

    def interrupt(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    def work(*_: object, **__: object) -> None:
        gc.callbacks.append(interrupt)
        gc.collect()
        ended.append("swallowed")
        time.sleep(30)

    monkeypatch.setattr("top_jax.cli.shared_flags.read_config", work)
    before = time.monotonic()
    assert command("evaluate", TINY, "--checkpoint=run").status == 130
    assert ended and time.monotonic() - before < 20
    assert sys.unraisablehook is hook


def test_the_reader_of_the_output_has_ended(command, monkeypatch):
    def work(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("top_jax.cli.shared_flags.read_config", work)
    result = command("evaluate", TINY, "--checkpoint=run")
    assert result.status == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1
    monkeypatch.setattr("top_jax.cli.usage.help_text", work)
    assert command("evaluate", "--help")[:] == (0, "", "")
