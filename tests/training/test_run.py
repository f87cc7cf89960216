"""Whole runs of train.py that do not end well, and what a run does to the process around it."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from runs import assert_same_run, kill_at, latest_step, metrics, reached

from top_jax import sharding
from top_jax.config import ModelConfig, PruningConfig
from top_jax.errors import InputError, RunError
from top_jax.ops.implementations import resolve
from top_jax.training import loop, run_directory
from top_jax.training.prepare import Prepared, make_plan
from top_jax.training.run_directory import RunDirectory


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_eight_devices(launcher, finished_run, tmp_path):
    """The same numbers, drop-path and micro-batches included, as on one."""
    flags = f"{launcher.environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**launcher.environment, "XLA_FLAGS": flags}
    out, err = launcher.finish(tmp_path, "--config.eval_batch_size=104", env=environment)
    assert err == "" and "on 8 x cpu" in out
    np.testing.assert_allclose(losses(tmp_path)[:3], losses(finished_run)[:3], rtol=1e-6)
    np.testing.assert_allclose(losses(tmp_path), losses(finished_run), rtol=1e-5)  # rounding, 30 steps later
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == 360  # each once: the last batch is padded


@pytest.mark.parametrize(("size", "parts", "needed"), [(12, 1, 8), (0, 1, 8), (24, 2, 16), (8, 2, 16)])
def test_batch_that_does_not_split(monkeypatch, size, parts, needed):
    monkeypatch.setattr(sharding.jax, "devices", lambda: [None] * 8)
    with pytest.raises(InputError) as caught:
        sharding.check_divisible("batch_size", size, parts)
    micro = f" times {parts} micro-batches" if parts > 1 else ""
    assert str(caught.value) == f"batch_size={size} is not divisible by 8 devices{micro}; use a multiple of {needed}."
    sharding.check_divisible("batch_size", 2 * needed, parts)


def test_a_run_that_would_never_end(tiny_config):
    for key, value in (("epochs", 1e300), ("total_steps", 10**30)):
        with pytest.raises(InputError, match=f"{key} makes a run of .* steps; needed: at most 2,147,483,647"):
            make_plan(dataclasses.replace(tiny_config, **{"total_steps": None, key: value}), 1437)


def test_the_scan_is_named_where_there_is_one(tiny_config):
    assert make_plan(tiny_config, 1437).model.scan_implementation == resolve("auto")
    deit = ModelConfig(
        name="deit_tiny", num_classes=10, img_size=(8,), patch_size=4, embed_dim=16, depth=2, num_heads=2
    )
    plan = make_plan(dataclasses.replace(tiny_config, model=deit, pruning=PruningConfig()), 1437)
    assert plan.model.scan_implementation is None


def test_a_full_disk_is_named(tmp_path):
    """However it is reported: by the system, or in the text of Orbax's error."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("OS_ERROR: No space left on device")):
        with pytest.raises(RunError, match="the disk is full"), loop._faults(RunDirectory(tmp_path)):
            raise error
    with pytest.raises(ValueError, match="something else"), loop._faults(RunDirectory(tmp_path)):
        raise ValueError("something else")


def test_a_directory_that_was_moved_is_named(tmp_path):
    """A folder that Orbax makes anew in its place is another one."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.remember_place()
    run.check_in_place()
    run.path.rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(RunError, match=f"{run.path} was moved or removed"):
            run.check_in_place()
        with pytest.raises(RunError, match=f"{run.path} was moved or removed"), loop._faults(run):
            raise FileNotFoundError("checkpoints/latest")
        run.path.mkdir(exist_ok=True)


def test_one_of_two_threads_trains(tmp_path):
    """The lock is the folder's, not the process's: two containers and two threads may share a process id."""
    held, refused = RunDirectory(tmp_path), []

    def train():
        try:
            with RunDirectory(tmp_path).lock():
                pass
        except InputError as error:
            refused.append(str(error))

    with held.lock():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert len(refused) == 1 and str(tmp_path) in refused[0]
    train()
    assert len(refused) == 1


def test_a_platform_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory.files, "fcntl", None)
    with pytest.raises(InputError, match="fcntl"), RunDirectory(tmp_path).lock():
        pass
    assert RunDirectory(tmp_path).read_json("summary.json") is None


def test_what_cannot_be_a_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("gs://bucket/run", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300), "nul\0"):
        with pytest.raises(InputError, match=r"bucket|file|nnnn|nul"):
            RunDirectory(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"accuracy": "high"}', "\x00" * 50, "[" * 100_000])
def test_a_damaged_summary_is_written_again(tmp_path, content, caplog):
    (tmp_path / "summary.json").write_text(content)
    prepared = object.__new__(Prepared)
    object.__setattr__(prepared, "run", RunDirectory(tmp_path))
    assert loop._earlier_summary(prepared) is None
    assert len(caplog.records) == 1 and f"{tmp_path}/summary.json" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"seeed": 1}', '{"model": 3}', "\x00" * 50, "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"{tmp_path}/config.json"):
        RunDirectory(tmp_path).read_config()


@pytest.mark.slow
def test_resuming_does_not_need_init_from(launcher, finished_run, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(finished_run, start)
    flag = f"--config.init_from={start}"
    process = launcher.start(tmp_path / "run", flag)
    while not list(tmp_path.glob("run/checkpoints/latest/4")):
        assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.communicate()
    assert losses(tmp_path / "run")[0] < losses(finished_run)[0] - 0.01  # from trained weights
    shutil.rmtree(start)
    out, _ = launcher.finish(tmp_path / "run", flag)
    assert "going on after step " in out and len(losses(tmp_path / "run")) == 30


@pytest.mark.slow
def test_taught_and_warmed_up(launcher, finished_run, tmp_path):
    """Three programs, one after the other, under a teacher; killed in the second, it ends with the same bits, though
    the teacher's own directory is gone."""
    source = shutil.copytree(finished_run, tmp_path / "source")
    flags = (
        f"--config.distillation.teacher={source}",
        "--config.distillation.token_weight=0.5",
        "--config.pruning.warmup_epochs=0.18",  # 16 steps
        "--config.pruning.warmup_stages=2",
    )
    finished, workdir = tmp_path / "finished", tmp_path / "killed"
    out, _ = launcher.finish(finished, *flags)
    assert "keep ratio 1 from step 0, 0.75 from step 8, 0.5 from step 16" in out
    lines = [line for line in metrics(finished) if line["kind"] == "train"]
    assert len(lines) == 30 and all(line["token_loss"] > 0 and line["distillation_loss"] > 0 for line in lines)
    kill_at(launcher, workdir, lambda: latest_step(workdir) >= 8 and reached(workdir, 10)(), *flags)
    shutil.rmtree(source)
    launcher.finish(workdir, *flags)
    assert_same_run(workdir, finished)


@pytest.mark.slow
def test_imports_neither_tensorflow_nor_torch(launcher, tmp_path, root):
    """What a run imports, to the end of a finished run: up to its last line, but without a step."""
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['train.py', '--config={root}/tests/tiny_run.py', '--workdir={tmp_path}']\n"
        "import top_jax.training.loop as loop\n"
        "loop.Loop.run = lambda *arguments: False\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'tensorflow', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert 'orbax' in sys.modules and 'grain' in sys.modules and not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=launcher.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tensorboard").is_dir()  # its writer is among them
