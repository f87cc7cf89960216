"""The suite goes on: past what fails and what there is no time for, with everything on disk."""

import json

import pytest

from top_jax.benchmark.scans import BATCH, VIM_SMALL
from top_jax.benchmark.suite import Part, cpu_parts, gpu_parts, run_suite
from top_jax.errors import InputError


def explode():
    raise RuntimeError("the device fell over")


def test_a_failing_part_stops_no_other(capsys, tmp_path):
    parts = [
        Part("bad", 0, explode),
        Part("bad row", 0, lambda: [{"a": 1}, {"a": 2, "error": "no launch"}]),
        Part("absent row", 0, lambda: [{"absent": "not here"}]),
        Part("good", 0, lambda: [{"a": 3}], ("xla", "associative")),
    ]
    assert run_suite(tmp_path / "out.json", 60.0, parts) == ["bad", "bad row"]
    assert "== good: xla, associative (after " in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert [result["status"] for result in results] == ["failed", "failed", "ok", "ok"]
    assert results[0]["error"] == "RuntimeError: the device fell over" and "explode" in results[0]["traceback"]
    assert results[3]["rows"] == [{"a": 3}]


def test_the_budget(capsys, tmp_path):
    ran = []
    parts = [
        Part("fits", 50, lambda: ran.append("fits") or []),
        Part("does not", 70, lambda: ran.append("does not") or []),
        Part("fits again", 1, lambda: ran.append("fits again") or []),
    ]
    assert run_suite(tmp_path / "out.json", 60.0, parts) == [] and ran == ["fits", "fits again"]
    skipped = json.loads((tmp_path / "out.json").read_text())["parts"][1]
    assert skipped["status"] == "skipped" and "70 s" in skipped["reason"] and "60" in skipped["reason"]
    assert f"== does not: skipped, {skipped['reason']}" in capsys.readouterr().out


def test_a_kill_loses_nothing(tmp_path):
    file = tmp_path / "out.json"

    def kill():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(file, parts=[Part("good", 0, lambda: [{"a": 1}]), Part("killed", 0, kill)])
    report = json.loads(file.read_text())
    assert [part["part"] for part in report["parts"]] == ["good"] and report["finished"] is False


def test_report(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert run_suite(file, parts=[Part("bad", 0, explode), Part("good", 0, lambda: [{"a": 1}])]) == ["bad"]
    report = json.loads(file.read_text())
    assert report["suite"] == "cpu" and report["note"].startswith("not yet measured on a GPU") and report["finished"]
    assert report["packages"]["jax"] and report["date"] and report["auto"]["name"] == "xla"
    printed = capsys.readouterr().out
    assert report["note"] in printed and "1 ok, 1 failed, 0 skipped" in printed and "failed: bad" in printed


def test_a_file_that_cannot_be_written(tmp_path):
    nothing = Part("in vain", 0, lambda: pytest.fail("nothing should be measured"))
    with pytest.raises(InputError, match=r"nowhere/out\.json"):
        run_suite(tmp_path / "nowhere" / "out.json", parts=[nothing])


def test_what_a_cpu_runs():
    """Every kind of part; tests/cli/test_benchmark.py runs them all (slow)."""
    names = [part.name for part in cpu_parts()]
    assert {"contract xla", "contract pallas_interpret", "scan, small", "model, micro ViM"} <= set(names)
    for part in cpu_parts():
        if part.name.endswith("is not measured"):
            (row,) = part.run()
            assert "absent" in row and "error" not in row


def test_what_a_gpu_would_run(fake_h200):
    parts = gpu_parts(fake_h200, {"clocks.max.sm": "1980"})
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[:6] == [
        "ceilings", "contract triton", "contract pallas", "contract xla", "scan ViM-S L197 bfloat16",
        "model vim_small bfloat16",
    ]  # fmt: skip
    assert parts[4].implementations == ("triton", "pallas", "xla", "associative")
    assert VIM_SMALL.scan("bfloat16").batch == BATCH == 128
    models = {"ViM-T": (197, 143), "ViM-S": (197, 102), "ViM-B": (197, 102), "PlainMamba-L1": (196, 68)}
    for model, lengths in (models | {"PlainMamba-L3": (196, 68)}).items():
        for dtype in ("float32", "bfloat16"):
            assert {f"scan {model} L{length} {dtype}" for length in lengths} <= set(names)
    assert "scan ViM-S, both directions L197 bfloat16" in names
    whole = ("vim_tiny", "vim_small", "vim_base", "plain_mamba_l1", "plain_mamba_l3", "deit_small")
    assert {f"model {name} bfloat16" for name in whole} <= set(names)
    assert {f"one image {name}" for name in whole} <= set(names)


def test_a_kernel_that_cannot_run_is_named(fake_h200):
    fake_h200.problems["triton"] = "jax-triton is not installed: pip"
    parts = {part.name: part for part in gpu_parts(fake_h200, {"clocks.max.sm": "1980"})}
    (row,) = parts["triton is not measured"].run()
    assert row["absent"].startswith("jax-triton is not installed")
    assert "contract triton" not in parts and "contract pallas" in parts
