"""A run that is killed, at any moment, and started again ends with the numbers of one that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from runs import assert_same_run, half_written, kill_at, latest_step, metrics, reached, summary, wait_for

from top_jax.training import load_checkpoint, train
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import read_weights

STEPS = 30


def test_uninterrupted(finished_run):
    lines = metrics(finished_run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20, 30]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(set(losses)) == STEPS and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01  # it learns
    assert summary(finished_run)["best_accuracy"] == max(
        line["ema_accuracy"] for line in lines if line["kind"] == "eval"
    )


@pytest.mark.slow
def test_killed_and_terminated(launcher, finished_run, tmp_path):
    """SIGKILL while a checkpoint is being written; then SIGTERM, which saves, says so and exits with status 0."""
    kill_at(launcher, tmp_path, half_written(tmp_path, "latest", after=4))
    killed = latest_step(tmp_path)
    assert killed < STEPS

    process = launcher.start(tmp_path)
    wait_for(process, reached(tmp_path, killed + 7))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and launcher.surprises(err) == ""
    stopped = latest_step(tmp_path)
    assert killed + 7 <= stopped < STEPS
    assert f"SIGTERM: saved at step {stopped}; start the same command again to go on." in out
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob("checkpoints/*/*tmp*"))  # what the kill left is gone

    out, _ = launcher.finish(tmp_path)
    assert f"going on after step {stopped}" in out
    assert_same_run(tmp_path, finished_run)


@pytest.mark.slow
def test_killed_anywhere(launcher, finished_run, tmp_path):
    """Before anything is saved, between two checkpoints, and while the best weights are being written."""
    kill_at(launcher, tmp_path, reached(tmp_path, 1))
    assert latest_step(tmp_path) == 0
    kill_at(launcher, tmp_path, lambda: latest_step(tmp_path) >= 4 and reached(tmp_path, 6)())
    kill_at(launcher, tmp_path, half_written(tmp_path, "best", after=0))
    kill_at(launcher, tmp_path, reached(tmp_path, 21))
    kill_at(launcher, tmp_path, lambda: latest_step(tmp_path) == STEPS)  # all but the summary, or not even that
    launcher.finish(tmp_path)
    assert_same_run(tmp_path, finished_run)


@pytest.mark.slow
def test_killed_with_batch_norm(launcher, tmp_path):
    """A PlainMamba, whose statistics are part of its state: two micro-batches in each step."""
    flags = ("--config.model.name=plain_mamba_l1", "--config.model.layers_with_dwconv=(0,)")
    workdir, finished = tmp_path / "killed", tmp_path / "finished"
    launcher.finish(finished, *flags)
    kill_at(launcher, workdir, lambda: latest_step(workdir) >= 4 and reached(workdir, 6)(), *flags)
    out, _ = launcher.finish(workdir, *flags)
    assert "going on after step " in out and "\ntokens per stage 4 -> 2; GMACs " in out  # it has no class token
    assert_same_run(workdir, finished)
    weights = read_weights(RunDirectory(workdir), "latest", ema=False)
    assert float(weights["blocks"][0]["tail"]["norm"]["num_batches"]) == 2 * STEPS


@pytest.mark.slow
def test_terminated_before_the_first_step(launcher, finished_run, tmp_path):
    process = launcher.start(tmp_path)
    wait_for(process, (tmp_path / "config.json").is_file)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and launcher.surprises(err) == ""
    assert "SIGTERM: " in out and latest_step(tmp_path) <= 1
    launcher.finish(tmp_path)
    assert_same_run(tmp_path, finished_run)


@pytest.mark.slow
def test_started_again_when_finished(launcher, finished_run, tmp_path):
    """It says the result once more, and changes nothing."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished_run, workdir)
    out, err = launcher.finish(workdir)
    assert err == "" and f"going on after step {STEPS}" in out
    assert out.splitlines()[1:-1] == (finished_run / "stdout").read_text().splitlines()[-3:-1]  # no step, no evaluation
    assert_same_run(workdir, finished_run)


@pytest.mark.slow
def test_killed_before_its_summary(launcher, finished_run, tmp_path):
    """It evaluates again, and reports no line twice."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished_run, workdir)
    (workdir / "summary.json").unlink()
    launcher.finish(workdir)
    assert_same_run(workdir, finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "accuracy", "images_per_second"])
def test_a_renamed_number_is_measured_again(finished_run, tiny_config, tmp_path, name):
    """A flipped bit in the last line of metrics.jsonl, which would be the summary's evaluation."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = max(place for place, line in enumerate(lines) if json.loads(line)["kind"] == "eval")
    lines[last] = lines[last].replace(f'"{name}"', f'"{name[:-1]}x"')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    again = train(tiny_config, run)
    assert (again["accuracy"], again["images"]) == (before["accuracy"], before["images"])


@pytest.mark.slow
def test_killed_with_worker_processes(launcher, finished_run, tmp_path):
    """Worker processes change no number, and none is left over when their parent is killed."""
    tag = "TOP_JAX_TEST_OF_WORKERS"
    launcher = type(launcher)(Path(launcher.environment["JAX_COMPILATION_CACHE_DIR"]))
    launcher.environment[tag] = str(tmp_path)
    process = launcher.start(tmp_path, "--config.data.num_workers=1")
    wait_for(process, reached(tmp_path, 9))
    assert len(processes_with(tag, str(tmp_path))) > 1
    process.kill()
    process.communicate()
    wait_until_gone(tag, str(tmp_path))
    process = launcher.start(tmp_path, "--config.data.num_workers=1")
    wait_for(process, reached(tmp_path, 14))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    wait_until_gone(tag, str(tmp_path))
    _, err = launcher.finish(tmp_path, "--config.data.num_workers=1")
    assert "Traceback" not in err, err
    wait_until_gone(tag, str(tmp_path))
    assert_same_run(tmp_path, finished_run)


def processes_with(name: str, value: str) -> list[int]:
    """Processes that were started with this environment variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_until_gone(name: str, value: str) -> None:
    deadline = time.monotonic() + 20
    while left := processes_with(name, value):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def test_loads_what_was_killed(finished_run, tmp_path):
    """A half-written checkpoint directory is not taken for a checkpoint, by a reader either."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished_run, workdir)
    for which in ("latest", "best"):
        folder = workdir / "checkpoints" / which
        whole = max(int(path.name) for path in folder.glob("*") if path.name.isdigit())
        half = folder / f"{whole + 1}.orbax-checkpoint-tmp"
        shutil.copytree(folder / str(whole), half)
        shutil.rmtree(half / "weights")
        model = load_checkpoint(workdir, which)
        assert half.is_dir()  # a reader removes nothing
        assert model.config.embed_dim == 16
