"""Tuning: the search, on a CPU in interpret mode, and the table it leaves, as the kernels and `auto` read it."""

import json

import pytest

from top_jax.benchmark.scans import ScanCase
from top_jax.benchmark.timing import Rounds
from top_jax.benchmark.tuning import Space, Target, fastest_first, this_gpu, tune
from top_jax.errors import InputError
from top_jax.kernels import blocks
from top_jax.ops import implementations

CASE = ScanCase("tiny", 3, 8, 2, directions=1, dtype="float32", batch=1)
TARGET = Target("NVIDIA H200", "580.1", ("pallas_interpret",), (CASE,))
BRIEF = Rounds(1, 0.0, 0.0)


def row(case, name, which, ms):
    return {"case": case, "implementation": name, "pass": which, "median_ms": ms}


def test_fastest_first():
    both = "forward+backward"
    measured = [
        row("a", "pallas", both, 4.0), row("a", "pallas", both, 2.0), row("a", "triton", both, 1.5),
        row("b", "pallas", both, 2.0), row("b", "triton", both, 1.0), row("b", "triton", "forward", 0.1),
        row("a", "xla", both, 30.0), row("b", "xla", both, 30.0),
        row("c", "pallas", both, 0.001),  # where only one ran nothing can be compared
        {"case": "c", "implementation": "triton", "pass": both, "error": "no launch"},
    ]  # fmt: skip
    assert fastest_first(measured) == ["triton", "pallas", "xla"]
    assert fastest_first([]) == []


def test_the_table_is_followed(no_tables, fake_h200):
    """A table of other blocks and another order than the rule's."""
    chosen = blocks.Blocks(12, 4, 16, 2, 3, 64, 4)
    assert blocks.choose_blocks("triton", "NVIDIA H200", 768, 16) == (blocks.by_rule("triton", 768, 16), "rule")
    assert implementations.choose().name == "triton" and "--tune" in implementations.choose().fix
    table = {
        "device": "NVIDIA H200",
        "kernels": blocks.KERNELS,
        "date": "2026-11-23",
        "fastest_first": ["pallas", "triton", "xla"],
        "blocks": {blocks.table_key("triton", 768, 16): vars(chosen)},
    }
    blocks.write_table(table, blocks.table_path("NVIDIA H200"))
    assert (no_tables / "nvidia-h200.json").is_file()
    assert blocks.choose_blocks("triton", "NVIDIA H200", 768, 16) == (chosen, "table")
    assert blocks.choose_blocks("triton", "NVIDIA H200", 384, 16)[1] == "rule"
    assert blocks.choose_blocks("triton", "NVIDIA H100", 768, 16)[1] == "rule"
    choice = implementations.choose()
    assert choice == ("pallas", "measured fastest on 2026-11-23", None)


@pytest.mark.slow
def test_search(no_tables, fake_h200, monkeypatch, capsys):
    monkeypatch.undo()  # the search needs the real device; the table is read as if on the other
    table_file = no_tables / "nvidia-h200.json"
    table = tune(TARGET, table_file, space=Space(((4, 1), (8, 1)), (2,)), rounds=BRIEF)
    assert json.loads(table_file.read_text()) == table
    assert list(table["blocks"]) == ["pallas/E8/N2"] and table["not_tuned"] == []
    assert set(table["fastest_first"]) == {"pallas", "xla"}
    assert table["driver"] == "580.1" and table["packages"]["jax"] and table["date"]
    tried = {(r["forward_channels"], r["backward_channels"], r["segment"]) for r in table["measured"] if "segment" in r}
    assert {channels for channels, _, _ in tried} == {4, 8} and {chunk for _, _, chunk in tried} == {
        2,
        blocks.by_rule("pallas", 8, 2).segment,
    }
    assert all("median_ms" in r for r in table["measured"])
    assert "tiny L3 float32 pallas_interpret: Blocks(" in capsys.readouterr().out


def test_a_candidate_that_fails_is_noted(tmp_path):
    """A kernel that cannot run here at all: no blocks, but a table that says why."""
    target = TARGET._replace(implementations=("triton",))
    table = tune(target, tmp_path / "table.json", space=Space(((4, 1),), (2,)), rounds=BRIEF)
    assert table["blocks"] == {} and table["fastest_first"] == ["xla"]
    assert "triton" in table["measured"][0]["error"]


def test_no_time(tmp_path, capsys):
    table = tune(TARGET, tmp_path / "table.json", budget=-1.0)
    assert table["blocks"] == {} and table["not_tuned"] == ["tiny L3 float32"]
    assert "tiny L3 float32: " in capsys.readouterr().out


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/table\.json"):
        tune(TARGET, tmp_path / "file" / "table.json")


def test_without_a_gpu():
    with pytest.raises(InputError, match="--tune ran on a cpu"):
        this_gpu()


def test_a_gpu_without_kernels(fake_h200):
    fake_h200.problems |= {"triton": "not installed", "pallas": "too old"}
    with pytest.raises(InputError, match="NVIDIA H200 .triton: not installed; pallas: too old"):
        this_gpu()


def test_what_a_gpu_would_tune(fake_h200):
    target = this_gpu()
    assert target.implementations == ("triton", "pallas") and target.device == "NVIDIA H200"
    assert target.shapes[0].name == "ViM-S"  # the most important, if time runs out
    assert {(case.name, case.width) for case in target.shapes} == {
        ("ViM-T", 384), ("ViM-S", 768), ("PlainMamba-L3", 896), ("ViM-B", 1536),
    }  # fmt: skip
