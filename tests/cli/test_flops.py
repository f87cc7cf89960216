"""flops: what it prints, writes and refuses."""

import json
import runpy
from pathlib import Path

import pytest

from top_jax.config import RunConfig
from top_jax.evaluation.flops.of_config import count_config

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


@pytest.mark.parametrize(
    ("config", "published", "dense", "all_directions"),
    [
        ("vim_t_top", 1.29, 1.45, 1.82),
        ("vim_s_top", 3.59, 5.07, 5.90),
        ("vim_b", 18.85, 18.85, 20.86),
        ("plain_mamba_l1", 3.01, 3.01, 3.01),
        ("plain_mamba_l2", 8.06, 8.06, 8.06),
        ("plain_mamba_l3_top", 8.43, 14.41, 14.41),
    ],
)
def test_the_published_numbers(root, config, published, dense, all_directions):
    """The table of docs/concepts/flops.md, section 1."""
    settings = runpy.run_path(str(root / "configs" / f"{config}.py"))["get_config"]()
    counts = count_config(RunConfig.from_config_dict(settings))
    assert round(counts["gmacs"]["published"], 2) == published
    assert round(counts["dense_gmacs"]["published"], 2) == dense
    assert round(counts["dense_gmacs"]["all_directions"], 2) == all_directions


def test_what_it_prints_and_writes(command, tmp_path):
    result = command("flops", TINY, f"--json={tmp_path}/flops.json")
    assert result.status == 0 and result.err == ""
    counts = json.loads((tmp_path / "flops.json").read_text())
    assert counts["model"] == "vim_tiny" and counts["tokens_per_block"] == [5, 3]
    for key in ("gmacs", "dense_gmacs"):
        assert counts[key].keys() == {"published", "all_directions", "executed"}
    assert counts["gmacs"]["executed"] < counts["dense_gmacs"]["executed"]
    for name, parts in counts["parts"].items():
        assert sum(parts.values()) / 1e9 == counts["gmacs"][name]
    assert counts["parameters"] == 6_858  # 784 + 16 + 80 in front, 2 x 2,896, 16 + 170 behind
    checked = counts["cross_check"]
    parts = counts["parts"]["executed"]
    products = checked["jaxpr"]["products"] + checked["jaxpr"]["taps"]
    assert products == sum(parts.values()) - parts["scan"] and checked["jaxpr"]["loops"] * 9 == parts["scan"] * 4
    assert "block 1: 5 tokens (class token included)\n  block 2: 3 tokens" in result.out
    assert "%" in result.out and "6,858 parameters" in result.out
    assert result.out.count("equal to the executed count") == 2
    assert "…" not in result.out  # rich cuts what has no place in 80 columns


def test_a_dense_model(command, tmp_path):
    result = command("flops", TINY, "--config.pruning.after_blocks=()", f"--json={tmp_path}/flops.json")
    counts = json.loads((tmp_path / "flops.json").read_text())
    assert result.status == 0 and counts["gmacs"] == counts["dense_gmacs"]
    assert "blocks 1 to 2: 5 tokens" in result.out and "dense" not in result.out


def test_a_mismatch_is_shown(command, monkeypatch):
    jaxpr, above = {"products": 5, "taps": 1, "loops": 2}, {"without_scans": -3, "scans": 1}
    checked = {"jaxpr": jaxpr, "jaxpr_above_executed": above}
    found = {"parameters": 7, "cross_check": checked}
    monkeypatch.setattr("top_jax.evaluation.flops.of_config.check_config", lambda *_, **__: found)
    out = command("flops", TINY).out
    assert "convolutions (DIFFERENT from the executed count: -3)" in out
    assert "operations (DIFFERENT from the executed count: +1)" in out


def test_refuses(refused):
    assert "unexpected argument 'x'" in refused("flops", "x", TINY)
    assert "--config is missing" in refused("flops")
    assert "after_blocks=(2,)" in refused("flops", TINY, "--config.pruning.after_blocks=(2,)")
    message = refused("flops", TINY, "--config.pruning.method=merge", "--config.pruning.keep_ratio=(0.1,)")
    assert "keep_ratio=0.1" in message
