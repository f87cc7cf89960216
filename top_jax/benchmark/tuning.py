"""Searches the kernels' block sizes on this GPU and writes the table that `auto` and the kernels then use.

The search starts from the rule's blocks and has three steps: channels and warps of the forward, by its time alone;
those of the backward, by the time of both passes; then the steps of a chunk and between saved states, also by both. A
candidate that does not compile or launch is recorded and passed over.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from top_jax.benchmark.floor import Ceilings
from top_jax.benchmark.scans import (
    FORWARD,
    SCANNED,
    WITH_GRADIENTS,
    ScanCase,
    input_sets,
    scan_of,
    time_programs,
    time_scans,
)
from top_jax.benchmark.timing import Rounds, Row, Timing, one_line
from top_jax.environment import environment, nvidia_smi
from top_jax.errors import InputError
from top_jax.files import check_folder
from top_jax.kernels import blocks as kernel_blocks
from top_jax.kernels.blocks import Blocks, by_rule, table_key, table_path, write_table
from top_jax.ops import implementations

ROUNDS: Final = Rounds(most=9, seconds=3.0, measurement=0.01)
BUDGET: Final = 200.0  # seconds: 4 minutes, less an overrun of the last shape
RIVAL: Final = "xla"  # timed on the same shapes, so that `auto` knows whether the kernels are faster
_WORKERS: Final = 8


class Space(NamedTuple):
    """Candidates of the search.

    Attributes:
        channels_warps: pairs of a program's channels and its warps.
        chunks: steps of a chunk of the forward and of the backward.
    """

    channels_warps: tuple[tuple[int, int], ...] = ((16, 1), (32, 1), (32, 2), (64, 1), (64, 2), (128, 4))
    chunks: tuple[int, ...] = (3, 4, 6, 8)


SPACE: Final = Space()


class Target(NamedTuple):
    """The device and the kernels whose blocks are searched.

    Attributes:
        device: JAX's device_kind, by which the kernels find the table.
        driver: version of its driver, or None.
        implementations: kernels to tune.
        shapes: one scan for each width.
    """

    device: str
    driver: str | None
    implementations: tuple[str, ...]
    shapes: tuple[ScanCase, ...]


def this_gpu() -> Target:
    """Returns the default device, the kernels that run on it, and a scan for each width of the published models.

    Raises:
        InputError: the device is not a GPU, or none of the kernels runs on it.
    """
    device = implementations.device()
    problems = {name: implementations.obstacle(name) for name in implementations.KERNELS}
    usable = tuple(name for name, problem in problems.items() if problem is None)
    if device.platform != "gpu":
        raise InputError(
            f"--tune ran on a {device.platform}; run it on the GPU whose block sizes it should search, with "
            "'top-jax[cuda]' installed."
        )
    if not usable:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise InputError(f"no kernel runs on this {device.device_kind} ({reasons}); fix that before --tune.")
    shapes: dict[int, ScanCase] = {}
    for case in (model.scan("bfloat16") for model in SCANNED):
        shapes.setdefault(case.width, case)  # the first of a width; ViM-S comes first
    return Target(device.device_kind, nvidia_smi().get("driver_version"), usable, tuple(shapes.values()))


def tune(
    target: Target, file: Path | None = None, budget: float = BUDGET, space: Space = SPACE, rounds: Rounds = ROUNDS
) -> dict[str, Any]:
    """Searches, prints the progress, and writes the table after each shape.

    Args:
        target: from `this_gpu`.
        file: where the table is written; None: where the kernels look for it.
        budget: seconds; shapes that do not fit keep the rule's blocks, and the table lists them.
        space: the candidates.
        rounds: how long to time each candidate.

    Raises:
        InputError: the table cannot be written there; this is checked before the search.
    """
    place = file or table_path(target.device)
    check_folder(place.parent, f"the tuning table {place} (--out writes it elsewhere)")
    start = time.perf_counter()
    table: dict[str, Any] = {
        "device": target.device,
        "driver": target.driver,
        "kernels": kernel_blocks.KERNELS,
        "date": datetime.date.today().isoformat(),
        "packages": environment()["packages"],
        "fastest_first": list(target.implementations),
        "not_tuned": [case.label() for case in target.shapes],
        "blocks": {},
        "measured": [],
    }
    for case in target.shapes:
        if time.perf_counter() - start > budget:
            print(f"{case.label()}: the budget of {budget:.0f} s is used up; it keeps the rule's blocks", flush=True)
            continue
        best = {name: _search(name, case, space, rounds, table["measured"]) for name in target.implementations}
        for name, blocks in best.items():
            if blocks is not None:
                key = table_key(name.removesuffix("_interpret"), case.width, case.states)
                table["blocks"][key] = dataclasses.asdict(blocks)
            print(f"{case.label()} {name}: {blocks or 'no candidate runs'}", flush=True)
        table["measured"] += time_scans(case, (RIVAL,), Ceilings(), rounds, passes=(WITH_GRADIENTS,))
        table["fastest_first"] = fastest_first(table["measured"]) or table["fastest_first"]
        table["not_tuned"].remove(case.label())
        write_table(table, place)
    print(f"fastest first: {', '.join(table['fastest_first'])}; written to {place}", flush=True)
    if file is not None:
        print(f"to use it, copy it to {table_path(target.device)}", flush=True)
    return table


def fastest_first(measured: list[Row]) -> list[str]:
    """Sorts implementations by their best time of both passes (geometric mean over the shapes that all of them ran)."""
    best: dict[str, dict[str, float]] = {}
    for row in measured:
        if row["pass"] == WITH_GRADIENTS and "median_ms" in row:
            times = best.setdefault(row["implementation"].removesuffix("_interpret"), {})
            times[row["case"]] = min(row["median_ms"], times.get(row["case"], math.inf))
    shared = set.intersection(*(set(times) for times in best.values())) if best else set()
    mean = {name: sum(math.log(times[case]) for case in shared) for name, times in best.items()}
    return sorted(mean, key=lambda name: mean[name])


def _search(name: str, case: ScanCase, space: Space, rounds: Rounds, measured: list[Row]) -> Blocks | None:
    """Returns the best blocks found, or None if none runs; adds every candidate to `measured`."""
    sets = input_sets(case, rotate=rounds.measurement > 0)

    def best_of(candidates: list[Blocks], which: str) -> Blocks | None:
        scans = {blocks: scan_of(case, name, blocks) for blocks in candidates}
        results = time_programs(scans, sets, rounds, _WORKERS, gradient=which == WITH_GRADIENTS)
        for blocks, result in results.items():
            row: Row = {"case": case.name, "implementation": name, "pass": which, **dataclasses.asdict(blocks)}
            measured.append(row | ({"error": one_line(result)} if isinstance(result, Exception) else result.row()))
        times = {blocks: result.spread.median for blocks, result in results.items() if isinstance(result, Timing)}
        return min(times, key=lambda blocks: times[blocks], default=None)

    start = by_rule(name.removesuffix("_interpret"), case.width, case.states)
    sizes = [(channels, warps) for channels, warps in space.channels_warps if channels < 2 * case.width]
    change = dataclasses.replace
    forward = [start, *(change(start, forward_channels=c, forward_warps=w) for c, w in sizes)]
    start = best_of(forward, FORWARD)
    if start is None:
        return None
    if not name.startswith("pallas"):  # the Triton backward is one warp
        sizes = [(channels, warps) for channels, warps in sizes if warps == start.backward_warps]
    both = [start, *(change(start, backward_channels=c, backward_warps=w) for c, w in sizes)]
    start = best_of(both, WITH_GRADIENTS)
    if start is None:
        return None
    return best_of([start, *_other_steps(name, start, space)], WITH_GRADIENTS)


def _other_steps(name: str, start: Blocks, space: Space) -> list[Blocks]:
    """Returns candidates with other chunks. Pallas saves every chunk; Triton also tries to rebuild less, or none."""
    change = dataclasses.replace
    if name.startswith("pallas"):
        return [change(start, segment=c, forward_chunk=c, backward_chunk=c) for c in space.chunks]
    chunks = [c for c in space.chunks if start.segment % c == 0]
    return [
        *(change(start, forward_chunk=c) for c in chunks),
        *(change(start, segment=c, forward_chunk=c) for c in chunks if c % start.backward_chunk == 0),
    ]
