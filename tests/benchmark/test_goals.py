"""Goals are judged by the rows of one H200."""

import pytest

from top_jax.benchmark.goals import judge


def scan_row(which, implementation, ms, times_floor=1.0, **other):
    return {
        "case": "ViM-S", "length": 197, "dtype": "bfloat16", "decay": False, "pass": which,
        "implementation": implementation, "median_ms": ms, "times_floor": times_floor, **other,
    }  # fmt: skip


def model_row(variant, speed, gmacs):
    return {
        "model": "vim_small", "variant": variant, "pass": "inference", "dtype": "bfloat16", "batch": 128,
        "images_per_s": speed, "gmacs_published": gmacs,
    }  # fmt: skip


ROWS = [
    scan_row("forward", "triton", 1.0, 1.5),
    scan_row("forward", "xla", 5.0, 7.5),
    scan_row("forward", "triton", 0.1, 0.1, length=102),
    scan_row("forward+backward", "triton", 2.0, 2.1),
    scan_row("forward+backward", "xla", 9.0, 9.0),
    model_row("dense", 1000.0, 5.0),
    model_row("pruned", 1350.0, 3.5),  # 1.35 of 1.4286
]


def test_reached_and_missed():
    goals = judge(ROWS, "NVIDIA H200", "triton")
    assert [(goal.got, goal.state) for goal in goals] == [
        (1.5, "reached"), (5.0, "reached"), (2.1, "missed"), (4.5, "missed"), (0.945, "reached"),
    ]  # fmt: skip
    assert judge([*ROWS[:-1], model_row("pruned", 1280.0, 3.5)], "NVIDIA H200", "triton")[-1].state == "missed"


@pytest.mark.parametrize("rows, device", [([], "NVIDIA H200"), (ROWS, "cpu"), (ROWS, "NVIDIA A100-SXM4-80GB")])
def test_not_measured(rows, device):
    goals = judge(rows, device, "triton")
    assert len(goals) == 5 and {(goal.got, goal.state) for goal in goals} == {(None, "not measured")}


def test_what_failed_is_not_measured():
    rows = [row for row in ROWS if row.get("implementation") != "triton"]
    broken = [{**scan_row("forward", "triton", 0.0), "error": "no launch"}]
    del broken[0]["median_ms"], broken[0]["times_floor"]
    assert {goal.state for goal in judge(rows + broken, "NVIDIA H200", "triton")[:4]} == {"not measured"}
