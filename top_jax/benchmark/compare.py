"""A config's model on this machine: dense, pruned, with every alignment, beside a DeiT; what pruning is worth here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp

from top_jax.benchmark.contestants import Contestant, field_of
from top_jax.benchmark.programs import PASSES
from top_jax.benchmark.race import LEAST_ROUNDS, WARM_UP, Race, growing, memory_limit
from top_jax.benchmark.report import write_whole
from top_jax.benchmark.speedup import LEAST_SHARE, conclusions, judged_by
from top_jax.environment import environment
from top_jax.errors import InputError
from top_jax.ops import implementations
from top_jax.pruning import Reduction

CPU_BUDGET: Final = 80.0  # seconds: with the start of Python and JAX and the last overrun, two minutes
GPU_BUDGET: Final = 450.0
_MOST_WORKERS: Final = 4
METHOD: Final = {
    "timing": "one process, contestants in turn, one call per measurement, waited for",
    "warm_up": f"compiling and {WARM_UP} calls of each program are not counted",
    "rounds": f"at least {LEAST_ROUNDS}; medians and quartiles over them",
    "speedup": "of each round dense time / own time; median and quartiles of these ratios",
    "verdict": f"pays little: even the upper quartile saves less than {LEAST_SHARE:g} of what the MACs promise",
    "weights": "random, an argument of the program: speed depends neither on them nor on which tokens stay",
    "inputs": "random images; drop-path left out",
}


def budget() -> float:
    """Seconds that are used where none are given."""
    return GPU_BUDGET if implementations.device().platform == "gpu" else CPU_BUDGET


def compare(
    name: str,
    reduction: Reduction,
    overrides: dict[str, Any],
    *,
    file: Path,
    about: dict[str, Any] | None = None,
    sizes: tuple[int, ...] | None = None,
    train: bool = False,
    seconds: float,
    advance: Callable[[int], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Measures, and keeps the report in `file` up to date.

    Args:
        name: of `top_jax.create_model`.
        reduction: the config's.
        overrides: the config's, for `create_model`.
        file: where the report is written, as JSON.
        about: what the report says of its config.
        sizes: batch sizes, in this order; None: 1, 8, 32 and doubled up to the largest that fits.
        train: time the train step too: forward in train mode, cross entropy, backward and AdamW.
        seconds: budget; what does not fit is skipped by name. At the first batch size the dense model
            and the config's own are measured whatever they take, and the last may overrun.
        advance: told of the seconds of the budget as they pass.

    Returns:
        The report: where it was measured, `contestants`, `rows` with all times, `skipped`, `conclusions`.

    Raises:
        InputError: sizes or a reduction that the model cannot have, or a file that cannot be written.
    """
    begun, shown = time.perf_counter(), 0
    field, no_yardstick = field_of(name, reduction, overrides)
    memory = memory_limit()
    report = _report(name, field, about or {}, memory, seconds)
    write_whole(file, report)  # before minutes are spent
    print(f"{len(field)} contestants: {'; '.join(contestant.name for contestant in field)}", flush=True)

    def tick() -> None:
        nonlocal shown
        elapsed = int(time.perf_counter() - begun)
        advance(elapsed - shown)
        shown = elapsed

    workers = max(2, min(_MOST_WORKERS, os.cpu_count() or 2))
    race = Race(field, seconds, memory=memory, workers=workers, tick=tick)
    if no_yardstick:
        race.results.skipped.append({"contestants": ["deit"], "reason": no_yardstick})

    def save() -> None:
        rows, skipped = race.results
        report.update(rows=rows, skipped=skipped, largest_batch=_largest(field, rows), conclusions=conclusions(rows))
        report["seconds"] = round(time.perf_counter() - begun, 1)
        report["load_average"]["end"] = _load()
        write_whole(file, report)

    race.run(PASSES if train else PASSES[:1], growing if sizes is None else lambda: sizes, save)
    report["finished"] = True
    save()
    return report


def batch_sizes(texts: list[str]) -> tuple[int, ...]:
    """Batch sizes as a command line gives them, smallest first.

    Raises:
        InputError: one is no whole number of at least 1, or there is none.
    """
    if not texts or not all(text.strip().isdecimal() and int(text) for text in texts):
        raise InputError(f"--batch_sizes={','.join(texts)}; needed: whole numbers from 1, such as 1,8,32.")
    return tuple(sorted({int(text) for text in texts}))


def _report(
    name: str, field: list[Contestant], about: dict[str, Any], memory: int | None, seconds: float
) -> dict[str, Any]:
    model, dense = field[0].model, field[0].cost
    return {
        **about,
        "model": name,
        **environment(),
        "load_average": {"start": _load(), "end": None},
        "dtype": jnp.dtype(model.config.dtype).name,
        "img_size": list(model.config.img_size),
        "implementation": model.scan_implementation,
        "method": METHOD,
        "judged_by": judged_by(dense.macs),
        "budget_s": seconds,
        "memory_limit_mib": None if memory is None else round(memory / 2**20),
        "finished": False,
        "contestants": [contestant.row() for contestant in field],
    }


def _load() -> float | None:
    """Processes that ran or waited over the last minute: against the cores, how much others took of the machine."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _largest(field: list[Contestant], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contestant and pass the largest batch that was measured, and the first that did not fit."""
    found = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        for contestant in field:
            own = [row for row in rows if (row["pass"], row["contestant"]) == (which, contestant.name)]
            ran = max((row["batch"] for row in own if "error" not in row), default=None)
            too_large = min((row["batch"] for row in own if row.get("out_of_memory")), default=None)
            found.append({"pass": which, "contestant": contestant.name, "batch": ran, "out_of_memory_at": too_large})
    return found
