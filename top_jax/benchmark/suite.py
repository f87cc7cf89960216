"""Runs every part of the suite within a budget of time; a part that fails or does not fit does not stop the others.

On a GPU: the ceilings of the device, the contract, the scans against their floor and each other, whole models. Without
a GPU the same kinds of parts run at small sizes, and the report says that none of its numbers is a GPU's.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from top_jax.benchmark import contract
from top_jax.benchmark.floor import Ceilings, measure_ceilings
from top_jax.benchmark.programs import INFERENCE, time_model
from top_jax.benchmark.scans import APART, ASSOCIATIVE, BATCH, SCANNED, ScanCase, time_scans
from top_jax.benchmark.timing import Rounds, Row, one_line
from top_jax.environment import environment, nvidia_smi
from top_jax.files import save_json
from top_jax.ops import implementations
from top_jax.ops.implementations import KERNELS
from top_jax.pruning import Evit, Pruning, Reduction
from top_jax.tables import rows_as_text

BUDGET: Final = 330.0  # seconds: 6 minutes, less the start of Python and JAX and an overrun of the last part
NOT_ON_A_GPU: Final = "not yet measured on a GPU: this machine has none that JAX sees"
# A measurement is long enough to hide the dispatch, and short enough that the queued calls' results fit in memory.
_GPU_ROUNDS: Final = Rounds(most=30, seconds=2.0, measurement=0.005)
_MODEL_ROUNDS: Final = Rounds(most=15, seconds=4.0, measurement=0.05)
_CPU_ROUNDS: Final = Rounds(most=3, seconds=2.0, measurement=0.0)
_SHARE_OF_MEMORY: Final = 0.8
_CONTRACT_RUNS: Final = 20  # of each case; a race between programs shows in some runs only


class Part(NamedTuple):
    """One part of a suite.

    Attributes:
        name: unique.
        seconds: estimate of its time; it is skipped if less is left. The report holds the time it took.
        run: returns its rows; the part has failed if one of them has `error`.
        implementations: implementations of the scan that it compares, for the printed heading.
    """

    name: str
    seconds: int
    run: Callable[[], list[Row]]
    implementations: tuple[str, ...] = ()


def run_suite(file: Path, budget: float = BUDGET, parts: list[Part] | None = None) -> list[str]:
    """Runs the parts in order, prints their tables, and keeps the report in `file` up to date.

    Args:
        file: where the report is written, as JSON. It has for each part its name, status (`ok`, `failed`, `skipped`),
            seconds, rows, and the reason or error.
        budget: seconds for all parts.
        parts: what to run; None: `gpu_parts` or `cpu_parts`.

    Returns:
        Names of the parts that failed.

    Raises:
        InputError: the file cannot be written.
    """
    start = time.perf_counter()
    where, choice, on_gpu = environment(), implementations.choose(), implementations.device().platform == "gpu"
    report: dict[str, Any] = {
        "suite": "gpu" if on_gpu else "cpu",
        **({} if on_gpu else {"note": NOT_ON_A_GPU}),
        **where,
        "auto": choice._asdict(),
        "budget_s": budget,
        "finished": False,
        "parts": [],
    }
    save_json(file, report)  # fails before minutes are spent
    print("{device} ({platform}), driver {driver}, {date}".format(**where))
    print(f"{', '.join(f'{name} {version}' for name, version in where['packages'].items())}")
    print(f"auto chooses {choice.name!r}: {choice.why}", flush=True)
    if not on_gpu:
        print(NOT_ON_A_GPU, flush=True)

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - start, 1)
        save_json(file, report)

    if parts is None:
        parts = gpu_parts(implementations.device(), where["nvidia_smi"]) if on_gpu else cpu_parts()
    for part in parts:
        report["parts"].append(_run_part(part, time.perf_counter() - start, budget))
        save()
    report |= {"finished": True, **({"nvidia_smi_after": nvidia_smi()} if on_gpu else {})}
    save()
    by_status = {s: [r["part"] for r in report["parts"] if r["status"] == s] for s in ("ok", "failed", "skipped")}
    counts = ", ".join(f"{len(names)} {status}" for status, names in by_status.items())
    print(f"\n{counts} in {report['seconds']:.0f} s; {file}")
    for status in ("failed", "skipped"):
        for name in by_status[status]:
            print(f"  {status}: {name}")
    return by_status["failed"]


def gpu_parts(device: Any, card: dict[str, str]) -> list[Part]:
    """Returns the parts for a GPU, the most important first, because the budget cuts the last.

    Args:
        device: a `jax.Device`.
        card: what `top_jax.environment.nvidia_smi` returned.
    """
    memory = int((device.memory_stats() or {}).get("bytes_limit", 0) * _SHARE_OF_MEMORY) or None
    usable = tuple(name for name in KERNELS if implementations.obstacle(name) is None)
    everyone = (*usable, "xla", ASSOCIATIVE)
    known = Ceilings()

    def ceilings() -> list[Row]:
        nonlocal known
        known = measure_ceilings(device, card, _GPU_ROUNDS)
        return [known.row()]

    def scans(case: ScanCase, names: tuple[str, ...], seconds: int) -> Part:
        run = lambda: time_scans(case, names, known, _GPU_ROUNDS, memory=memory, workers=8)  # noqa: E731
        return Part(f"scan {case.label()}", seconds, run, names)

    def contracts(name: str) -> Part:
        return Part(f"contract {name}", 60, lambda: contract.check_contract(name, contract.FULL, 8, _CONTRACT_RUNS))

    def models(name: str, pruning: Reduction, dtype: str, seconds: int) -> Part:
        run = lambda: time_model(name, pruning, BATCH, _MODEL_ROUNDS, dtype=dtype)  # noqa: E731
        return Part(f"model {name} {dtype}", seconds, run)

    def one_image(name: str, pruning: Reduction) -> Part:
        return Part(f"one image {name}", 30, lambda: time_model(name, pruning, 1, _MODEL_ROUNDS, passes=(INFERENCE,)))

    def pruned(dtype: str, *, decay: bool) -> list[Part]:
        """Returns the scans after the last prune; those of the first model without decay are in the list already."""
        cases = (model.scan(dtype, length=model.lengths()[-1], decay=decay) for model in SCANNED)
        return [scans(case, usable, 15) for case in cases if case not in small]

    first, *others = SCANNED
    small = [first.scan("bfloat16", length=length) for length in first.lengths()]
    whole = {model.name: model.pruning for model in SCANNED}
    whole |= {"deit_small": Evit(after_blocks=(4, 7, 10), keep_ratio=0.7)}

    parts = [Part("ceilings", 10, ceilings), *(_unusable(name) for name in KERNELS if name not in usable)]
    parts += [contracts(name) for name in (*usable, "xla")]
    parts += [scans(small[0], everyone, 30), models(first.name, first.pruning, "bfloat16", 90)]
    parts += [scans(case, everyone, 20) for case in small[1:]]
    # ViM's two directions in one gated call: its mixer would use this if it were faster.
    both = dataclasses.replace(small[0], name=f"{first.label}, both directions", directions=2, gated=True)
    parts += [scans(both, (*usable, APART), 20)]
    parts += [scans(model.scan("bfloat16"), everyone, 30) for model in others]
    parts += pruned("bfloat16", decay=False)
    parts += [models(name, pruning, "bfloat16", 60) for name, pruning in whole.items() if name != first.name]
    parts += [one_image(name, pruning) for name, pruning in whole.items()]
    parts += pruned("bfloat16", decay=True)
    parts += [scans(model.scan("float32"), everyone, 30) for model in SCANNED]
    return [*parts, *pruned("float32", decay=False), models(first.name, first.pruning, "float32", 90)]


def cpu_parts() -> list[Part]:
    """Returns small parts of every kind, which also check the kernels as far as interpret mode can."""
    no_gpu = Ceilings(clock_source="no GPU")
    scan = ScanCase("ViM-like", 33, 32, dtype="float32", batch=2)
    micro: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "d_state": 4,
        "num_classes": 10,
    }
    half = Pruning(after_blocks=(1,), keep_ratio=0.5)
    one, *_, rounded = contract.TINY
    return [
        *(_unusable(name) for name in KERNELS if implementations.obstacle(name)),
        Part("contract xla", 60, lambda: contract.check_contract("xla", contract.TINY)),
        Part("contract pallas_interpret", 60, lambda: contract.check_contract("pallas_interpret", (one, rounded))),
        Part("scan, small", 30, lambda: time_scans(scan, ("xla", ASSOCIATIVE), no_gpu, _CPU_ROUNDS)),
        Part("model, micro ViM", 60, lambda: time_model("vim_tiny", half, 4, _CPU_ROUNDS, dtype="float32", **micro)),
    ]


def _unusable(name: str) -> Part:
    """Returns a part that only records why an implementation is not measured, which is not a failure."""
    rows = [{"implementation": name, "absent": str(implementations.obstacle(name))}]
    return Part(f"{name} is not measured", 0, lambda: rows)


def _run_part(part: Part, elapsed: float, budget: float) -> dict[str, Any]:
    """Returns the part's entry in the report."""
    left = budget - elapsed
    if left < part.seconds:
        reason = f"it needs about {part.seconds} s; {max(left, 0):.0f} s of the budget of {budget:.0f} s are left"
        print(f"\n== {part.name}: skipped, {reason}", flush=True)
        return {"part": part.name, "status": "skipped", "reason": reason, "seconds": 0.0, "rows": []}
    compared = f": {', '.join(part.implementations)}" if part.implementations else ""
    print(f"\n== {part.name}{compared} (after {elapsed:.0f} s)", flush=True)
    start, result = time.perf_counter(), {"part": part.name}
    try:
        rows = part.run()
        failed = any("error" in row for row in rows)
        result |= {"status": "failed" if failed else "ok", "rows": rows}
        print(rows_as_text(rows), flush=True)
    except Exception as error:  # any error: the other parts can still be measured
        result |= {"status": "failed", "error": one_line(error), "traceback": traceback.format_exc(), "rows": []}
        print(f"failed: {one_line(error)}", flush=True)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}
