"""Searches the kernels' block sizes on this GPU and writes the table that `auto` and the kernels then follow.

The search goes from the rule's blocks to better ones in three steps: channels and warps of the forward, timed alone;
those of the backward, by the time of both passes; then the chunk, likewise. A candidate that does not compile or launch
is noted and left.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from top_jax.benchmark.cases import MODELS, ScanCase, model_case
from top_jax.benchmark.floor import Ceilings
from top_jax.benchmark.scans import PASSES, input_sets, scan_of, time_programs, time_scans, with_gradients
from top_jax.benchmark.timing import Rounds, Row, Timing, told
from top_jax.environment import environment, nvidia_smi
from top_jax.errors import InputError
from top_jax.kernels.blocks import (
    Blocks,
    by_rule,
    table_key,
    table_path,
    write_table,
)
from top_jax.ops import implementations
from top_jax.ops.implementations import KERNELS

ROUNDS: Final = Rounds(most=9, seconds=3.0, measurement=0.01)
BUDGET: Final = 540.0  # seconds
_WORKERS: Final = 8
_UNKNOWN: Final = Ceilings(None, None, None, "not needed")


class Space(NamedTuple):
    """What is tried.

    Attributes:
        channels_warps: channels of a program and its warps.
        chunks: steps of a chunk.
    """

    channels_warps: tuple[tuple[int, int], ...] = ((16, 1), (32, 1), (32, 2), (64, 1), (64, 2), (128, 4))
    chunks: tuple[int, ...] = (3, 4, 6, 8)


SPACE: Final = Space()


class Target(NamedTuple):
    """Whose blocks are searched.

    Attributes:
        device: JAX's device_kind, by which the table is found again.
        driver: version of its driver, or None.
        implementations: kernels to tune.
        beside: implementations to time on the same shapes, so that `auto` knows whether the kernels are faster.
        shapes: one for each width.
    """

    device: str
    driver: str | None
    implementations: tuple[str, ...]
    beside: tuple[str, ...]
    shapes: tuple[ScanCase, ...]


def this_gpu() -> Target:
    """The default device, the kernels that run on it, and the widths of the published models.

    Raises:
        InputError: the device is no GPU, or none of the kernels runs on it.
    """
    device = implementations.device()
    problems = {name: implementations.obstacle(name) for name in KERNELS}
    usable = tuple(name for name, problem in problems.items() if problem is None)
    if device.platform != "gpu":
        raise InputError(
            f"--tune came on a {device.platform}; it needs the GPU whose table it is to write: run it there, with "
            "'top-jax[cuda]' installed."
        )
    if not usable:
        told = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise InputError(f"--tune found no kernel that runs on this {device.device_kind} ({told}); mend that first.")
    shapes: dict[int, ScanCase] = {}
    for model in MODELS:
        shapes.setdefault(model.width, model_case(model, "bfloat16"))  # the first of a width, ViM-S before all
    return Target(device.device_kind, nvidia_smi().get("driver_version"), usable, ("xla",), tuple(shapes.values()))


def tune(
    target: Target, file: Path | None = None, budget: float = BUDGET, space: Space = SPACE, rounds: Rounds = ROUNDS
) -> dict[str, Any]:
    """Searches, printing as it goes, and writes the table after each shape.

    Args:
        target: what is searched.
        file: where the table goes; None is where the kernels look for it.
        budget: seconds; shapes for which none are left keep the rule's blocks, and the table names them.
        space: what is tried.
        rounds: of each timing.

    Raises:
        InputError: the table cannot be written, found out before the search.
    """
    place = file or table_path(target.device)
    _check_writable(place)
    begun = time.perf_counter()
    table: dict[str, Any] = {
        "device": target.device,
        "driver": target.driver,
        "date": datetime.date.today().isoformat(),
        "packages": environment()["packages"],
        "fastest_first": list(target.implementations),
        "not_tuned": [case.label() for case in target.shapes],
        "blocks": {},
        "measured": [],
    }
    for case in target.shapes:
        if time.perf_counter() - begun > budget:
            print(f"{case.label()}: no time left of {budget:.0f} s, it keeps the rule's blocks", flush=True)
            continue
        best = {name: _search(name, case, space, rounds, table["measured"]) for name in target.implementations}
        for name, blocks in best.items():
            if blocks is not None:
                table["blocks"][table_key(name.removesuffix("_interpret"), case.width, case.states)] = (
                    dataclasses.asdict(blocks)
                )
            print(f"{case.label()} {name}: {blocks or 'no candidate runs'}", flush=True)
        table["measured"] += time_scans(case, target.beside, _UNKNOWN, rounds, passes=PASSES[1:])
        table["fastest_first"] = fastest_first(table["measured"]) or table["fastest_first"]
        table["not_tuned"].remove(case.label())
        _write(table, place)
    print(f"fastest first: {', '.join(table['fastest_first'])}; written to {place}", flush=True)
    if file is not None:
        print(f"to be used it has to lie at {table_path(target.device)}", flush=True)
    return table


def fastest_first(measured: list[Row]) -> list[str]:
    """Implementations by their best times of both passes: geometric mean over the shapes at which all of them ran."""
    best: dict[str, dict[str, float]] = {}
    for row in measured:
        if row["pass"] == PASSES[1] and "median_ms" in row:
            times = best.setdefault(row["implementation"].removesuffix("_interpret"), {})
            times[row["case"]] = min(row["median_ms"], times.get(row["case"], math.inf))
    shared = set.intersection(*(set(times) for times in best.values())) if best else set()
    mean = {name: sum(math.log(times[case]) for case in shared) for name, times in best.items()}
    return sorted(mean, key=lambda name: mean[name])


def _search(name: str, case: ScanCase, space: Space, rounds: Rounds, measured: list[Row]) -> Blocks | None:
    """The best blocks found, or None if none runs; every candidate is added to `measured`."""

    sets = input_sets(case, rotate=rounds.measurement > 0)

    def best_of(candidates: list[Blocks], which: str) -> Blocks | None:
        gradient, by_text = which == PASSES[1], {str(blocks): blocks for blocks in candidates}
        scans = {text: scan_of(case, name, blocks) for text, blocks in by_text.items()}
        functions = {text: with_gradients(scan) if gradient else scan for text, scan in scans.items()}
        results = time_programs(functions, [pair if gradient else pair[:1] for pair in sets], rounds, _WORKERS)
        for text, result in results.items():
            row: Row = {"case": case.name, "implementation": name, "pass": which, **dataclasses.asdict(by_text[text])}
            measured.append(row | ({"error": told(result)} if isinstance(result, Exception) else result.row()))
        times = {text: result.median for text, result in results.items() if isinstance(result, Timing)}
        return by_text[min(times, key=lambda text: times[text])] if times else None

    start = by_rule(name.removesuffix("_interpret"), case.width, case.states)
    sizes = [(channels, warps) for channels, warps in space.channels_warps if channels < 2 * case.width]
    change = dataclasses.replace
    forward = [start, *(change(start, forward_channels=c, forward_warps=w) for c, w in sizes)]
    start = best_of(forward, PASSES[0])
    if start is None:
        return None
    both = [start, *(change(start, backward_channels=c, backward_warps=w) for c, w in sizes)]
    start = best_of(both, PASSES[1])
    if start is None:
        return None
    return best_of([start, *(change(start, chunk=chunk) for chunk in space.chunks)], PASSES[1])


def _check_writable(file: Path) -> None:
    folder = next((parent for parent in file.absolute().parents if parent.exists()), file.absolute().parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise _not_writable(file, f"no right to write in {folder}")


def _write(table: dict[str, Any], file: Path) -> None:
    try:
        write_table(table, file)
    except OSError as error:
        raise _not_writable(file, error.strerror) from error


def _not_writable(file: Path, why: str | None) -> InputError:
    return InputError(
        f"the tuning table {file} cannot be written ({why}); make that possible, or choose another file with --out and "
        "put it there later."
    )
