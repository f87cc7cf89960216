"""What is asked of the kernels and of pruning on one H200, and whether the rows of a report reach it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from top_jax.benchmark.scans import PASSES
from top_jax.benchmark.timing import Row

REACHED: Final = "reached"
MISSED: Final = "missed"
NOT_MEASURED: Final = "not measured"
NEEDED_DEVICE: Final = "H200"
# The issue's; at most, of the time over the floor, and at least, of the xla implementation's time over ours.
_MOST_TIMES_FLOOR: Final = {PASSES[0]: 1.5, PASSES[1]: 2.0}
_LEAST_TIMES_XLA: Final = 5.0
_LEAST_OF_PROMISE: Final = 0.9


class Goal(NamedTuple):
    """One goal.

    Attributes:
        what: in words.
        needed: in words and a number.
        got: the number, or None.
        state: `reached`, `missed` or `not measured`.
    """

    what: str
    needed: str
    got: float | None
    state: str


def judge(rows: list[Row], device: str, scan: str) -> list[Goal]:
    """The goals, judged by the rows of a report.

    Args:
        rows: of all its parts.
        device: JAX's device_kind: on another than an H200 nothing counts.
        scan: the implementation to be judged, the one that `auto` runs.
    """
    rows = rows if NEEDED_DEVICE in device else []
    goals = []
    for which, most in _MOST_TIMES_FLOOR.items():
        what = f"ViM-S scan, batch 128, bfloat16, {which} ({scan})"
        ours, xla = _scan(rows, which, scan), _scan(rows, which, "xla")
        ratio = ours.get("times_floor")
        goals.append(_goal(what, "times its floor, at most", most, ratio, ratio is not None and ratio <= most))
        faster = xla["median_ms"] / ours["median_ms"] if ours and xla else None
        reached = faster is not None and faster >= _LEAST_TIMES_XLA
        goals.append(_goal(what, "times as fast as xla, at least", _LEAST_TIMES_XLA, faster, reached))
    share = _share_of_promise(rows)
    what = "pruned ViM-S inference, batch 128, bfloat16: speed-up over that of its published FLOPs"
    goals.append(_goal(what, "at least", _LEAST_OF_PROMISE, share, share is not None and share >= _LEAST_OF_PROMISE))
    return goals


def _share_of_promise(rows: list[Row]) -> float | None:
    found = {
        row["variant"]: row
        for row in rows
        if "images_per_s" in row
        and (row["model"], row["pass"], row["dtype"], row["batch"]) == ("vim_small", "inference", "bfloat16", 128)
    }
    if found.keys() != {"dense", "pruned"}:
        return None
    dense, pruned = found["dense"], found["pruned"]
    return pruned["images_per_s"] / dense["images_per_s"] / (dense["gmacs_published"] / pruned["gmacs_published"])


def _scan(rows: list[Row], which: str, implementation: str) -> Row:
    """The dense ViM-S row, or an empty one."""
    wanted = {
        "case": "ViM-S", "length": 197, "dtype": "bfloat16", "decay": False, "pass": which,
        "implementation": implementation,
    }  # fmt: skip
    fits = (row for row in rows if "median_ms" in row and all(row.get(key) == value for key, value in wanted.items()))
    return next(fits, {})


def _goal(what: str, needed: str, limit: float, got: Any, reached: bool) -> Goal:
    state = NOT_MEASURED if got is None else REACHED if reached else MISSED
    return Goal(what, f"{needed} {limit}", None if got is None else round(float(got), 3), state)
