"""Reports of real, small comparisons, as JSON and as text."""

import json

import pytest

from top_jax.benchmark.compare import as_text, batch_sizes, compare, conclusions
from top_jax.benchmark.contestants import DENSE
from top_jax.benchmark.race import LITTLE, PAYS, SLOWER
from top_jax.errors import InputError

pytestmark = pytest.mark.slow

PRUNED = "top hold (config)"


@pytest.fixture(scope="module")
def measured(small_deit, attentive, tmp_path_factory):
    """A report, its file, and what was reported as progress."""
    file, seconds = tmp_path_factory.mktemp("compare") / "a.json", []
    report = compare(
        small_deit, attentive, file=file, about={"config": "x"}, sizes=(1, 32), seconds=600.0,
        memory=2**30, advance=seconds.append,
    )  # fmt: skip
    return report, file, seconds


def test_report(measured):
    report, file, seconds = measured
    assert json.loads(file.read_text()) == report
    assert report["finished"] and report["config"] == "x" and report["dtype"] == "float32"
    wanted = {
        "load_average", "device", "driver", "packages", "date", "method", "budget_s", "memory_limit_mib", "judged_by",
        "seconds",
    }  # fmt: skip
    assert report.keys() >= wanted
    dense, pruned = report["contestants"]
    assert dense["contestant"] == DENSE and pruned["contestant"] == PRUNED
    assert dense["tokens_per_block"] == [5, 5] and pruned["tokens_per_block"] == [5, 3]
    assert pruned["gmacs"].keys() >= {"published", "all_directions"}
    assert [(row["batch"], row["contestant"]) for row in report["rows"]] == [
        (batch, name) for batch in (1, 32) for name in (DENSE, PRUNED)
    ]
    assert {row["contestant"]: row["batch"] for row in report["largest_batch"]} == {DENSE: 32, PRUNED: 32}
    assert [row["contestants"] for row in report["skipped"]] == [["deit"]]
    assert sum(seconds) <= report["seconds"]


def test_text(measured):
    report, _, _ = measured
    shown = as_text(report)
    assert f"Skipped: deit: {report['skipped'][0]['reason']}." in shown
    assert "600 s and 1024 MiB" in shown and report["device"] in shown
    assert all(f"\n| {row['contestant']} " in shown for row in report["contestants"])
    assert shown.index("does not pay") > shown.index("| inference")
    assert all(line in shown for line in report["conclusions"])


def test_the_largest_batch_that_fits(measured, small_deit, attentive, tmp_path):
    needed = {(row["contestant"], row["batch"]): row["program_mib"] for row in measured[0]["rows"]}
    limit = (needed[DENSE, 1] + needed[PRUNED, 32]) / 2
    report = compare(
        small_deit, attentive, file=tmp_path / "a.json", sizes=(1, 32), seconds=600.0,
        memory=int(limit * 2**20),
    )  # fmt: skip
    largest = {row["contestant"]: (row["batch"], row["out_of_memory_at"]) for row in report["largest_batch"]}
    assert largest == {DENSE: (1, 32), PRUNED: (1, 32)}
    shown = as_text(report)
    assert "inference, dense: 1 fits, 32 does not." in shown and "out of memory" in shown


def test_a_file_that_cannot_be_written_costs_no_time(small_deit, attentive, tmp_path, capsys):
    with pytest.raises(InputError, match=r"no/a\.json"):
        compare(small_deit, attentive, file=tmp_path / "no" / "a.json", seconds=1.0)
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("texts", [[], ["8", ""], ["0"], ["-1"], ["1.5"], ["eight"]])
def test_batch_sizes_that_are_none(texts):
    with pytest.raises(InputError, match=f"--batch_sizes={','.join(texts)}"):
        batch_sizes(texts)
    assert batch_sizes(["32", "8", "8"]) == (8, 32)


def row(batch, name, median, found):
    return {
        "pass": "inference", "batch": batch, "contestant": name, "speedup": median,
        "speedup_quartiles": [median - 0.1, median + 0.1], "verdict": found, "macs_ratio": {"executed": 1.5},
    }  # fmt: skip


def test_conclusions():
    """A sentence for each pass, batch size and verdict; none for what pays."""
    rows = [
        {"pass": "inference", "batch": 1, "contestant": "dense"},
        row(1, "hold", 0.8, SLOWER),
        row(1, "decay", 0.7, SLOWER),
        row(8, "hold", 1.2, LITTLE),
        row(8, "decay", 1.5, PAYS),
    ]
    slower, little = conclusions(rows)
    assert slower.startswith(f"inference, batch 1: {SLOWER}: hold at 0.80 (0.70 .. 0.90) ")
    assert "decay at 0.70 (0.60 .. 0.80) " in slower and "executed" in slower and "1.50" in slower
    assert little.startswith("inference, batch 8: ") and "hold at 1.20" in little and "decay" not in little
    (nowhere,) = conclusions(rows[-1:])
    assert nowhere.startswith("Nowhere")
    assert conclusions(rows[:1]) == []
