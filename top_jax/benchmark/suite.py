"""Runs every part within a budget of time; what fails or finds no time is recorded by name and the rest goes on.

On a GPU: the device's ceilings, the contract, the scan against its floor and the others, whole models. Without one the
same parts run on sizes a CPU has time for, and say so; no GPU number comes of it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from top_jax.benchmark import cases, contract
from top_jax.benchmark.cases import ScanCase, both_directions, model_case
from top_jax.benchmark.floor import Ceilings, measure_ceilings
from top_jax.benchmark.goals import NEEDED_DEVICE, judge
from top_jax.benchmark.models import ModelCase, time_model
from top_jax.benchmark.report import table, write_whole
from top_jax.benchmark.scans import APART, ASSOCIATIVE, time_scans
from top_jax.benchmark.timing import Rounds, Row, dispatch_seconds, told
from top_jax.environment import environment, nvidia_smi
from top_jax.ops import implementations
from top_jax.ops.implementations import KERNELS
from top_jax.pruning import Pruning

BUDGET: Final = 450.0  # seconds: 8 minutes, less what starting Python and JAX takes and the last part may overrun
NOT_ON_A_GPU: Final = "not yet measured on a GPU: this machine has none that JAX sees"
# A measurement is long enough to hide the dispatch and short enough that what queued calls allocate fits the memory.
_GPU_ROUNDS: Final = Rounds(most=30, seconds=2.0, measurement=0.005)
_MODEL_ROUNDS: Final = Rounds(most=15, seconds=4.0, measurement=0.05)
_CPU_ROUNDS: Final = Rounds(most=3, seconds=2.0, measurement=0.0)
_SHARE_OF_MEMORY: Final = 0.8


class Part(NamedTuple):
    """One part of a suite.

    Attributes:
        name: unique.
        seconds: guess of what it takes; it is not begun with less left. The report holds what it took.
        run: returns its rows; one with `error` makes the part a failed one.
    """

    name: str
    seconds: int
    run: Callable[[], list[Row]]


def run_parts(
    parts: list[Part], budget: float, save: Callable[[list[dict[str, Any]]], None], begun: float | None = None
) -> list[dict[str, Any]]:
    """Runs parts in order and hands all results so far to `save` after each.

    Args:
        parts: what to run.
        budget: seconds for all.
        save: called with the list that is returned, as it grows.
        begun: `time.perf_counter()` at the start of the budget; None is now.

    Returns:
        For each part its name, status (`ok`, `failed`, `skipped`), seconds, rows, and the reason or error.
    """
    begun = time.perf_counter() if begun is None else begun
    results: list[dict[str, Any]] = []
    for part in parts:
        left = budget - (time.perf_counter() - begun)
        if left < part.seconds:
            reason = f"needs about {part.seconds:.0f} s and {max(left, 0):.0f} of the budget of {budget:.0f} are left"
            results.append({"part": part.name, "status": "skipped", "reason": reason, "seconds": 0.0, "rows": []})
            print(f"\n== {part.name}: skipped, {reason}", flush=True)
        else:
            results.append(_run_part(part, elapsed=budget - left))
        save(results)
    return results


def failed(results: list[dict[str, Any]]) -> list[str]:
    """Names of the parts that failed."""
    return [result["part"] for result in results if result["status"] == "failed"]


def run_suite(file: Path, budget: float = BUDGET) -> list[str]:
    """Runs the parts that this machine can, prints tables and goals, and keeps `file` up to date.

    Returns:
        Names of the parts that failed.

    Raises:
        InputError: the file cannot be written.
    """
    begun = time.perf_counter()
    where, choice, on_gpu = environment(), implementations.choose(), implementations.device().platform == "gpu"
    report: dict[str, Any] = {
        "suite": "gpu" if on_gpu else "cpu",
        **({} if on_gpu else {"note": NOT_ON_A_GPU}),
        **where,
        "auto": choice._asdict(),
        "budget_s": budget,
        "finished": False,
        "goals": [],
        "parts": [],
    }
    write_whole(file, report)  # before minutes are spent
    print("{device} ({platform}), driver {driver}, {date}".format(**where))
    print(f"{', '.join(f'{name} {version}' for name, version in where['packages'].items())}")
    print(f"auto runs {choice.name!r}: {choice.why}", flush=True)
    if not on_gpu:
        print(NOT_ON_A_GPU, flush=True)

    def save(results: list[dict[str, Any]]) -> None:
        rows = [row for result in results for row in result["rows"]]
        report["parts"] = results
        report["goals"] = [goal._asdict() for goal in judge(rows, where["device"], choice.name)]
        report["seconds"] = round(time.perf_counter() - begun, 1)
        write_whole(file, report)

    results = run_parts(gpu_parts(where["nvidia_smi"]) if on_gpu else cpu_parts(), budget, save, begun)
    report |= {"finished": True, **({"nvidia_smi_after": nvidia_smi()} if on_gpu else {})}
    save(results)
    print(f"\n== goals, on one {NEEDED_DEVICE}\n{table(report['goals'])}")
    _summarise(results, file, report["seconds"])
    return failed(results)


def gpu_parts(card: dict[str, str]) -> list[Part]:
    """What the goals need first, then the rest, so that a budget cuts what matters least.

    Args:
        card: what `nvidia_smi` says.
    """
    device = implementations.device()
    memory = int((device.memory_stats() or {}).get("bytes_limit", 0) * _SHARE_OF_MEMORY) or None
    ceilings = _Measured(device, card)
    usable = tuple(name for name in KERNELS if implementations.obstacle(name) is None)
    everyone = (*usable, "xla", ASSOCIATIVE)

    def scans(case: ScanCase, names: tuple[str, ...], seconds: int) -> Part:
        run = lambda: time_scans(case, names, ceilings.get(), _GPU_ROUNDS, memory=memory, workers=8)  # noqa: E731
        return Part(f"scan {case.label()}", seconds, run)

    def contracts(name: str) -> Part:
        return Part(f"contract {name}", 60, lambda: contract.check_contract(name, contract.FULL, workers=8))

    def models(name: str, pruning: Pruning, dtype: str, seconds: int) -> Part:
        case = ModelCase(name, pruning, cases.BATCH, dtype)
        return Part(f"model {name} {dtype}", seconds, lambda: time_model(case, _MODEL_ROUNDS))

    small, tiny, base, *mambas = cases.MODELS
    parts = [Part("ceilings", 10, ceilings.rows), *(_unusable(name) for name in KERNELS if name not in usable)]
    parts += [contracts(name) for name in (*usable, "xla")]
    parts += [scans(model_case(small, "bfloat16"), everyone, 30), models("vim_small", small.pruning, "bfloat16", 90)]
    parts += [scans(model_case(small, "bfloat16", length=length), everyone, 20) for length in small.pruned_lengths()]
    parts += [scans(both_directions(small, "bfloat16"), (*usable, APART), 20)]
    parts += [scans(model_case(model, "bfloat16"), everyone, 30) for model in (tiny, base, *mambas)]
    parts += [models("vim_tiny", tiny.pruning, "bfloat16", 60), models("vim_base", base.pruning, "bfloat16", 90)]
    parts += [scans(model_case(model, "float32"), everyone, 30) for model in cases.MODELS]
    parts += [
        scans(model_case(model, dtype, length=model.pruned_lengths()[-1], decay=decay), usable, 15)
        for dtype, decay in (("bfloat16", True), ("bfloat16", False), ("float32", False))
        for model in cases.MODELS
        if (model, dtype, decay) != (small, "bfloat16", False)  # measured above
    ]
    return [*parts, models("vim_small", small.pruning, "float32", 90)]


def cpu_parts() -> list[Part]:
    """That every part of the suite runs, and that the kernels are right as far as interpret mode can tell."""
    ceilings = Ceilings(None, None, None, "no GPU")
    scan = ScanCase("ViM-like", 33, 32, dtype="float32", batch=2)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 10}
    micro = ModelCase("vim_tiny", Pruning(after_blocks=(1,), keep_ratio=0.5), 4, "float32", overrides=sizes)
    one, *_, rounded = contract.TINY
    return [
        *(_unusable(name) for name in KERNELS if implementations.obstacle(name)),
        Part("contract xla", 60, lambda: contract.check_contract("xla", contract.TINY)),
        Part("contract pallas_interpret", 60, lambda: contract.check_contract("pallas_interpret", (one, rounded))),
        Part("scan, small", 30, lambda: time_scans(scan, ("xla", ASSOCIATIVE), ceilings, _CPU_ROUNDS)),
        Part("model, micro ViM", 60, lambda: time_model(micro, _CPU_ROUNDS)),
    ]


class _Measured:
    """The ceilings, measured by the first part and used by those after it."""

    def __init__(self, device: Any, card: dict[str, str]):
        self._device, self._card = device, card
        self._ceilings = Ceilings(None, None, None, "not measured")

    def rows(self) -> list[Row]:
        self._ceilings = found = measure_ceilings(self._device, self._card, _GPU_ROUNDS)
        row = {**found._asdict(), "exponentials": found.exponentials, "dispatch_us": round(dispatch_seconds() * 1e6, 1)}
        if found.exponentials is None:
            row["error"] = f"no floor without multiprocessors and clock ({found.clock_source})"
        return [row]

    def get(self) -> Ceilings:
        return self._ceilings


def _unusable(name: str) -> Part:
    """A part that only says why an implementation is not measured; that is no failure."""
    return Part(
        f"{name} is not measured", 0, lambda: [{"implementation": name, "absent": str(implementations.obstacle(name))}]
    )


def _run_part(part: Part, elapsed: float) -> dict[str, Any]:
    print(f"\n== {part.name} (after {elapsed:.0f} s)", flush=True)
    start, result = time.perf_counter(), {"part": part.name}
    try:
        rows = part.run()
        bad = [row["error"] for row in rows if "error" in row]
        result |= {"status": "failed" if bad else "ok", "rows": rows}
        print(table(rows), flush=True)
    except Exception as error:  # whatever it is, the other parts can still tell something
        result |= {"status": "failed", "error": told(error), "traceback": traceback.format_exc(), "rows": []}
        print(f"failed: {told(error)}", flush=True)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def _summarise(results: list[dict[str, Any]], file: Path, seconds: float) -> None:
    counts = {status: [r["part"] for r in results if r["status"] == status] for status in ("ok", "failed", "skipped")}
    print(f"\n{', '.join(f'{len(names)} {status}' for status, names in counts.items())} in {seconds:.0f} s; {file}")
    for status in ("failed", "skipped"):
        for name in counts[status]:
            print(f"  {status}: {name}")
