"""Block sizes: checked, and looked up in the order given > table > rule."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import pytest

from tools.triton_resources import SHAPES, Shape, operands_of, plan_of
from top_jax.benchmark.tuning import SPACE, _other_steps
from top_jax.errors import InputError
from top_jax.kernels import blocks
from top_jax.kernels.blocks import Blocks, by_rule, choose_blocks
from top_jax.kernels.triton_scan import KernelCall, backward_call, forward_call


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "TUNING", tmp_path)
    blocks.read_table.cache_clear()
    yield tmp_path
    blocks.read_table.cache_clear()


def test_the_table_comes_before_the_rule(tables):
    tuned = vars(Blocks(12, 4, 64, 2, 3, 16, 1))
    (tables / "nvidia-h200.json").write_text(
        json.dumps(
            {"fastest_first": [], "date": "today", "kernels": blocks.KERNELS, "blocks": {"triton/E768/N16": tuned}}
        )
    )
    assert choose_blocks("triton", "NVIDIA H200", 768, 16) == (Blocks(**tuned), "table")
    assert choose_blocks("triton", "NVIDIA H200", 384, 16) == (by_rule("triton", 384, 16), "rule")
    assert choose_blocks("pallas", "NVIDIA H200", 768, 16) == (by_rule("pallas", 768, 16), "rule")
    assert choose_blocks("triton", "NVIDIA A100", 768, 16) == (by_rule("triton", 768, 16), "rule")


@pytest.mark.parametrize("width, states", [(1, 1), (5, 3), (768, 16), (384, 64), (31, 500)])
def test_the_rule_gives_blocks_for_any_size(width, states):
    for name in ("pallas", "triton"):
        rule = by_rule(name, width, states)
        assert rule.forward_channels <= max(8, 2 * width)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "field, value",
    [
        ("segment", 0),
        ("segment", 22),
        ("forward_chunk", 2.5),
        ("backward_chunk", True),
        ("forward_channels", 48),
        ("backward_warps", 3),
        ("forward_warps", 64),
    ],
)
def test_blocks_that_cannot_be(field, value):
    with pytest.raises(InputError, match=re.escape(f"{field}={value}")):
        Blocks(**{**vars(by_rule("triton", 768, 16)), field: value})


def backward_with(blocks: Blocks, shape: Shape = SHAPES[1]) -> KernelCall:
    arguments, plan = operands_of(shape, "bfloat16", 2), plan_of(shape)
    starts = forward_call(arguments, plan, blocks, save=True).outputs[-1]
    return backward_call(arguments, starts, jax.ShapeDtypeStruct(arguments.u.shape[1:], "bfloat16"), plan, blocks)


@pytest.mark.parametrize("change", [{"backward_chunk": 3}, {"backward_warps": 2}, {"backward_channels": 4}])
def test_the_triton_backward_refuses_other_blocks(change):
    with pytest.raises(InputError, match=re.escape("{}={}".format(*next(iter(change.items()))))):
        backward_with(dataclasses.replace(by_rule("triton", 768, 16), **change))


@pytest.mark.parametrize("width, states", [(1, 1), (5, 3), (768, 16), (384, 64), (31, 500)])
def test_the_triton_backward_takes_what_the_rule_and_the_search_give(width, states):
    rule = by_rule("triton", width, states)
    for blocks_ in (rule, *_other_steps("triton", rule, SPACE)):
        call = backward_with(blocks_, SHAPES[1]._replace(width=width, states=states))
        assert call.warps == 1 and call.constants["segment"] % 4 == 0
        assert call.constants["block_e"] * call.grid[1] >= width and call.constants["block_n"] >= states
