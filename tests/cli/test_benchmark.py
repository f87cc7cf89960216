"""benchmark: what it refuses, and the part of the suite that needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from top_jax.benchmark.programs import BOTH_PASSES as PASSES

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


def test_help(command):
    result = command("benchmark", "--help")
    assert result.status == 0
    flags = ("--suite", "--tune", "--out", "--budget", "--config", "--batch_sizes", "--train")
    assert all(flag in result.out for flag in flags)


def test_refuses(refused):
    needed = refused("benchmark")
    assert all(flag in needed for flag in ("--config=FILE", "--suite=gpu", "--suite=cpu", "--tune"))
    assert refused("benchmark", "--suite=cpu", "--tune") == needed
    assert refused("benchmark", TINY, "--suite=cpu") == refused("benchmark", TINY, "--tune") == needed
    assert "--suite=tpu" in refused("benchmark", "--suite=tpu")
    assert "--sweet" in refused("benchmark", "--sweet=gpu")
    assert "unexpected argument 'gpu'" in refused("benchmark", "gpu")
    assert "--budget=0" in refused("benchmark", "--suite=cpu", "--budget=0")


def test_refuses_what_is_of_a_config(refused, tmp_path):
    file = f"--out={tmp_path}/a.json"
    assert refused("benchmark", "--suite=cpu", "--batch_sizes=8", file).startswith("--batch_sizes needs --config")
    assert refused("benchmark", "--suite=cpu", "--train", file).startswith("--train needs --config")
    assert refused("benchmark", TINY, "--batch_sizes=0", file).startswith("--batch_sizes=0")
    assert "no key 'sweet'" in refused("benchmark", TINY, "--config.sweet=1", file)
    assert "after_blocks=(9,)" in refused("benchmark", TINY, "--config.pruning.after_blocks=(9,)", file)
    assert refused("benchmark", TINY, "--out=/nowhere/a.json").startswith("/nowhere/a.json")
    assert not (tmp_path / "a.json").exists()


def test_refuses_a_file_that_cannot_be_written(refused):
    message = refused("benchmark", "--suite=gpu", "--out=/nowhere/a.json")
    assert message.startswith("/nowhere/a.json") and "No such file or directory" in message


def test_tuning_needs_a_gpu(refused, tmp_path):
    message = refused("benchmark", "--tune", f"--out={tmp_path}/table.json")
    assert "--tune" in message and "GPU" in message
    assert not (tmp_path / "table.json").exists()


def test_what_failed_is_in_the_exit_status(command, tmp_path, monkeypatch):
    from top_jax.benchmark import suite

    bad = suite.Part("bad", 0, lambda: [{"error": "no launch"}])
    monkeypatch.setattr(suite, "cpu_parts", lambda: [bad, suite.Part("good", 0, list)])
    result = command("benchmark", "--suite=gpu", f"--out={tmp_path}/a.json")
    assert result.status == 1 and result.err.count("\n") == 1
    assert "(bad)" in result.err and f"{tmp_path}/a.json" in result.err


@pytest.mark.slow
def test_config(command, tmp_path):
    file = tmp_path / "a.json"
    evit = (
        "--config.pruning.method=evit",
        "--config.pruning.score=clip",
        "--config.pruning.fuse=False",
    )  # few programs
    result = command("benchmark", TINY, *evit, f"--out={file}", "--batch_sizes=2", "--train", "--budget=600")
    assert result.status == 0, result.err
    report = json.loads(file.read_text())
    assert report["finished"] and report["config"] == "tiny_run" and not report["skipped"]
    names = [row["contestant"] for row in report["contestants"]]
    assert [(row["pass"], row["contestant"]) for row in report["rows"]] == [
        (which, name) for which in ("inference", "train step") for name in names
    ]
    assert names == ["dense", "evit none (config)", "deit"] and not [row for row in report["rows"] if "error" in row]
    assert all(row["program_mib"] > 0 and row["compile_s"] > 0 for row in report["rows"])
    assert f"{file} has every time." in result.out and "| train step" in result.out


@pytest.mark.slow
def test_segmenter(command, tmp_path):
    file = tmp_path / "a.json"
    evit = ("--config.pruning.method=evit", "--config.pruning.score=clip", "--config.pruning.fuse=False")
    flags = (*evit, f"--out={file}", "--batch_sizes=1", "--budget=600")
    result = command("benchmark", "--config=tests/tiny_segmenter.py", *flags)
    assert result.status == 0, result.err
    report = json.loads(file.read_text())
    assert report["head"] == "uper" and report["img_size"] == [32, 32] and [*report["passes"]] == [*PASSES]
    dense, pruned = report["contestants"]
    assert dense["backbone_gmacs"]["published"] < dense["gmacs"]["published"] > pruned["gmacs"]["published"]
    assert [row["contestant"] for row in report["rows"]] == ["dense", "evit none (config)"]
    row = report["rows"][1]
    assert row["backbone_macs_ratio"]["published"] > row["macs_ratio"]["published"] > 1 and row["program_mib"] > 0
    (skipped,) = report["skipped"]
    assert skipped["contestants"] == ["deit"] and skipped["reason"] in result.out
    assert "GMACs, published / backbone" in result.out and "MACs, published / backbone" in result.out


@pytest.mark.slow
def test_suite_without_a_gpu(root, tmp_path):
    """Hides the packages that a borrowed GPU machine lacks."""
    blocked = "import sys; [sys.modules.__setitem__(n, None) for n in ('ml_collections', 'grain', 'jax_triton')]"
    call = "sys.argv = ['benchmark', '--suite=gpu', '--out=a.json']; import runpy"
    program = f"{blocked}; {call}; runpy.run_module('top_jax.cli.benchmark', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["note"].startswith("not yet measured on a GPU") and "not yet measured on a GPU" in done.stdout
    assert report["finished"] and {part["status"] for part in report["parts"]} == {"ok"}
    assert report["packages"]["jax"] and report["device"] and report["date"]
