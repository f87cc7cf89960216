"""The suite goes on: past what fails and what there is no time for, with everything on disk."""

import json
import time

import pytest

from top_jax.benchmark import suite
from top_jax.benchmark.suite import Part, failed, gpu_parts, run_parts, run_suite
from top_jax.errors import InputError


def explode():
    raise RuntimeError("the device fell over")


def test_a_failing_part_stops_no_other():
    saved = []
    parts = [
        Part("bad", 0, explode),
        Part("bad row", 0, lambda: [{"a": 1}, {"a": 2, "error": "no launch"}]),
        Part("absent row", 0, lambda: [{"absent": "not here"}]),
        Part("good", 0, lambda: [{"a": 3}]),
    ]
    results = run_parts(parts, 60.0, lambda results: saved.append(len(results)))
    assert [result["status"] for result in results] == ["failed", "failed", "ok", "ok"]
    assert failed(results) == ["bad", "bad row"]
    assert results[0]["error"] == "RuntimeError: the device fell over" and "explode" in results[0]["traceback"]
    assert results[3]["rows"] == [{"a": 3}] and saved == [1, 2, 3, 4]


def test_the_budget(capsys):
    ran = []
    parts = [
        Part("fits", 50, lambda: ran.append("fits") or []),
        Part("does not", 70, lambda: ran.append("does not") or []),
        Part("fits again", 1, lambda: ran.append("fits again") or []),
    ]
    results = run_parts(parts, 100.0, lambda results: None, begun=time.perf_counter() - 40)
    assert ran == ["fits", "fits again"] and not failed(results)
    assert results[1]["status"] == "skipped"
    assert results[1]["reason"].startswith("needs about 70 s and ") and "budget of 100" in results[1]["reason"]
    assert "== does not: skipped, needs about 70 s" in capsys.readouterr().out


def test_a_kill_loses_nothing(tmp_path, monkeypatch):
    file = tmp_path / "out.json"

    def kill():
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "cpu_parts", lambda: [Part("good", 0, lambda: [{"a": 1}]), Part("killed", 0, kill)])
    with pytest.raises(KeyboardInterrupt):
        run_suite(file)
    report = json.loads(file.read_text())
    assert [part["part"] for part in report["parts"]] == ["good"] and report["finished"] is False


def test_report(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    monkeypatch.setattr(suite, "cpu_parts", lambda: [Part("bad", 0, explode), Part("good", 0, lambda: [{"a": 1}])])
    assert run_suite(file) == ["bad"]
    report = json.loads(file.read_text())
    assert report["suite"] == "cpu" and report["note"].startswith("not yet measured on a GPU") and report["finished"]
    assert {goal["state"] for goal in report["goals"]} == {"not measured"}
    assert report["packages"]["jax"] and report["date"] and report["auto"]["name"] == "xla"
    printed = capsys.readouterr().out
    assert "not yet measured on a GPU" in printed and "1 ok, 1 failed, 0 skipped" in printed


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "cpu_parts", lambda: pytest.fail("nothing is to be measured in vain"))
    with pytest.raises(InputError, match="cannot be written"):
        run_suite(tmp_path / "nowhere" / "out.json")


@pytest.fixture
def fast_parts(monkeypatch):
    """What the GPU's parts would call, noted and answered at once."""
    calls = []
    monkeypatch.setattr(suite, "time_scans", lambda case, names, *_, **__: calls.append((case, names)) or [])
    monkeypatch.setattr(suite, "time_model", lambda case, *_: calls.append((case, ())) or [])
    monkeypatch.setattr(suite.contract, "check_contract", lambda name, *_, **__: calls.append((name, ())) or [])
    monkeypatch.setattr("top_jax.benchmark.floor.copy_bandwidth", lambda *_: 4e12)
    monkeypatch.setattr(suite, "dispatch_seconds", lambda: 1e-5)
    return calls


def test_what_a_gpu_would_run(fake_h200, fast_parts):
    parts = gpu_parts({"clocks.max.sm": "1980"})
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    results = run_parts(parts, 1e9, lambda results: None)
    assert not failed(results) and results[0]["rows"][0]["exponentials"] == 132 * 1.98e9 * 16
    assert [call[0] for call in fast_parts[:3]] == ["triton", "pallas", "xla"]
    goal_scan, names = fast_parts[3]
    assert (goal_scan.name, goal_scan.length, goal_scan.batch, goal_scan.dtype) == ("ViM-S", 197, 128, "bfloat16")
    assert names == ("triton", "pallas", "xla", "associative")
    assert (fast_parts[4][0].name, fast_parts[4][0].batch) == ("vim_small", 128)
    scans = {(call.name, call.dtype, call.length < 196) for call, names in fast_parts if names}
    models = {"ViM-T", "ViM-S", "ViM-B", "PlainMamba-L1", "PlainMamba-L3"}
    dtypes = ("float32", "bfloat16")
    expected = {(name, dtype, pruned) for name in models for dtype in dtypes for pruned in (False, True)}
    assert scans == expected | {("ViM-S, both directions", "bfloat16", False)}


def test_a_kernel_that_cannot_run_is_named(fake_h200, fast_parts, monkeypatch):
    fake_h200.problems["triton"] = "jax-triton is not installed: pip"
    results = run_parts(gpu_parts({"clocks.max.sm": "1980"}), 1e9, lambda results: None)
    rows = {result["part"]: result["rows"] for result in results}
    assert rows["triton is not measured"][0]["absent"].startswith("jax-triton is not installed")
    assert "contract triton" not in rows and "contract pallas" in rows and not failed(results)


def test_no_clock_no_floor(fake_h200, fast_parts):
    results = run_parts(gpu_parts({"problem": "nvidia-smi is not there"})[:1], 1e9, lambda results: None)
    assert failed(results) == ["ceilings"]
    assert "unknown: nvidia-smi is not there" in results[0]["rows"][0]["error"]
