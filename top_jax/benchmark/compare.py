"""Measures a config's model on this machine (dense, pruned, every alignment, a DeiT) and the gain of pruning.

`compare` measures and writes a report as JSON, `as_text` turns the report into text with Markdown tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp

from top_jax.benchmark.contestants import Contestant, field_of
from top_jax.benchmark.programs import BOTH_PASSES, INFERENCE, TRAIN_STEP
from top_jax.benchmark.race import (
    JUDGED_BY,
    LEAST_ROUNDS,
    LEAST_SHARE,
    LITTLE,
    NO_GAIN,
    PAYS,
    SLOWER,
    WARM_UP,
    Race,
    growing,
    memory_limit,
)
from top_jax.build import backbone_of
from top_jax.config import ModelConfig
from top_jax.environment import environment
from top_jax.errors import InputError
from top_jax.files import save_json
from top_jax.ops import implementations
from top_jax.pruning import Reduction
from top_jax.tables import markdown

CPU_BUDGET: Final = 80.0  # seconds; two minutes with the start of Python and JAX and an overrun at the end
GPU_BUDGET: Final = 450.0
_MOST_WORKERS: Final = 4
METHOD: Final = {
    "timing": "one process, contestants in turn, one call per measurement, waited for",
    "warm_up": f"compiling and {WARM_UP} calls of each program are not counted",
    "rounds": f"at least {LEAST_ROUNDS}; medians and quartiles over them",
    "speedup": "dense time / own time of each round; median and quartiles of these ratios",
    "verdict": f"pays little: even the upper quartile saves less than {LEAST_SHARE:g} of what the MACs predict",
    "weights": "random, an argument of the program; the speed depends neither on them nor on which tokens are kept",
    "inputs": "random images; no drop-path",
}
_PASSES: Final = {
    INFERENCE: "images to logits",
    TRAIN_STEP: "forward in train mode, cross entropy, backward, AdamW",
}
_SEGMENTER_PASSES: Final = {
    INFERENCE: "from a crop to the class of each pixel, as evaluation computes it for one window",
    TRAIN_STEP: "forward of both heads in train mode (BatchNorm, dropout), their losses by rows, backward, AdamW",
}
_PHRASES: Final = {
    SLOWER: SLOWER,
    NO_GAIN: f"{NO_GAIN}, within the spread of the measurements",
    LITTLE: "faster, but by less than half of the time that the multiply-accumulates predict",
}
_NOTHING: Final = "-"


def budget() -> float:
    """Returns the default budget in seconds."""
    return GPU_BUDGET if implementations.device().platform == "gpu" else CPU_BUDGET


def compare(
    config: ModelConfig,
    reduction: Reduction,
    *,
    file: Path,
    img_size: tuple[int, int] | None = None,
    about: dict[str, Any] | None = None,
    sizes: tuple[int, ...] | None = None,
    train: bool = False,
    seconds: float,
    memory: int | None = None,
    advance: Callable[[int], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Times the contestants, and keeps the report in `file` up to date.

    Args:
        config: the model, a classifier or a segmenter.
        reduction: the config's.
        file: where the report is written, as JSON.
        img_size: (height, width) of the images; None is the model's. Only a PlainMamba segmenter takes others.
        about: JSON values about the config, for the report.
        sizes: batch sizes, in this order; None: 1, 8, 32 and doubled up to the largest that fits.
        train: time the train step too: forward, loss, backward, AdamW.
        seconds: budget; what does not fit is skipped, and the report lists it. At the first batch size the dense model
            and the config's own are always measured, and the last measurement may exceed the budget.
        memory: bytes that one program may take; None: half of the free memory on a CPU, else only the device's limit.
        advance: called with the seconds of the budget that have passed since the last call.

    Returns:
        The report: environment, `contestants`, `rows` with all times, `skipped`, `conclusions`.

    Raises:
        InputError: sizes or a reduction that the model cannot have, or a file that cannot be written.
    """
    start, shown = time.perf_counter(), 0
    field, no_yardstick = field_of(config, reduction, img_size)
    memory = memory_limit() if memory is None else memory
    report = _report(config, field, about or {}, memory, seconds)
    save_json(file, report)  # fails before minutes are spent
    print(f"{len(field)} contestants: {'; '.join(contestant.name for contestant in field)}", flush=True)

    def tick() -> None:
        nonlocal shown
        elapsed = int(time.perf_counter() - start)
        advance(elapsed - shown)
        shown = elapsed

    workers = max(2, min(_MOST_WORKERS, os.cpu_count() or 2))
    race = Race(field, seconds, memory=memory, workers=workers, tick=tick)
    if no_yardstick:
        race.skipped.append({"contestants": ["deit"], "reason": no_yardstick})

    def save() -> None:
        report.update(rows=race.rows, skipped=race.skipped, conclusions=conclusions(race.rows))
        report["largest_batch"] = _largest(field, race.rows)
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["load_average"]["end"] = _load()
        save_json(file, report)

    race.run(BOTH_PASSES if train else (INFERENCE,), growing if sizes is None else lambda: sizes, save)
    report["finished"] = True
    save()
    return report


def batch_sizes(texts: list[str]) -> tuple[int, ...]:
    """Returns the batch sizes of a command line, smallest first.

    Raises:
        InputError: there is none, or one is not a whole number of at least 1.
    """
    if not texts or not all(text.strip().isdecimal() and int(text) for text in texts):
        raise InputError(f"--batch_sizes={','.join(texts)} needs whole numbers from 1, such as 1,8,32.")
    return tuple(sorted({int(text) for text in texts}))


def conclusions(rows: list[dict[str, Any]]) -> list[str]:
    """Returns sentences on where pruning does not pay, from the rows of a report; none if no row has a verdict."""
    judged = [row for row in rows if "verdict" in row]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in judged:
        if row["verdict"] != PAYS:
            groups.setdefault((row["pass"], row["batch"], row["verdict"]), []).append(_judged(row))
    lines = [
        f"{which}, batch {batch}: {_PHRASES[found]}: {'; '.join(models)}."
        for (which, batch, found), models in groups.items()
    ]
    return lines if lines or not judged else ["Nowhere: pruning pays in every case measured here."]


def as_text(report: dict[str, Any]) -> str:
    """Returns the report as text: the contestants, a table for each pass, limits, and where pruning does not pay."""
    passes = list(dict.fromkeys(row["pass"] for row in report["rows"]))
    parts = [_environment_text(report, passes), _contestants_text(report)]
    parts += [_pass_text(report, which) for which in passes]
    if report["conclusions"]:
        pays = "\n".join(["Where pruning does not pay:", *(f"  {line}" for line in report["conclusions"])])
    else:
        pays = "No pruned model was timed together with the dense one."
    return "\n\n".join([*parts, _limits_text(report), pays])


def _report(
    config: ModelConfig, field: list[Contestant], about: dict[str, Any], memory: int | None, seconds: float
) -> dict[str, Any]:
    model = field[0].model
    return {
        **about,
        "model": config.name,
        "head": config.head,
        "num_classes": config.num_classes,
        **environment(),
        "load_average": {"start": _load(), "end": None},
        "dtype": jnp.dtype(backbone_of(model).config.dtype).name,
        "img_size": list(field[0].img_size),
        "implementation": model.scan_implementation,
        "method": METHOD,
        "passes": _SEGMENTER_PASSES if config.is_segmenter else _PASSES,
        "judged_by": JUDGED_BY,
        "budget_s": seconds,
        "memory_limit_mib": None if memory is None else round(memory / 2**20),
        "finished": False,
        "contestants": [contestant.row() for contestant in field],
    }


def _load() -> float | None:
    """Returns the load average of the last minute, which shows how much of the machine other processes took."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _largest(field: list[Contestant], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, by contestant and pass, the largest batch that was measured and the first that did not fit."""
    found = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        for contestant in field:
            own = [row for row in rows if (row["pass"], row["contestant"]) == (which, contestant.name)]
            ran = max((row["batch"] for row in own if "error" not in row), default=None)
            too_large = min((row["batch"] for row in own if row.get("out_of_memory")), default=None)
            found.append({"pass": which, "contestant": contestant.name, "batch": ran, "out_of_memory_at": too_large})
    return found


def _judged(row: dict[str, Any]) -> str:
    alone = f", {row['backbone_macs_ratio'][JUDGED_BY]:.2f} of the backbone alone" if _has_heads(row) else ""
    predicted = f"{JUDGED_BY} MACs predict {row['macs_ratio'][JUDGED_BY]:.2f}{alone}"
    return f"{row['contestant']} at {_speedup(row)} times the dense speed ({predicted})"


def _has_heads(row: dict[str, Any]) -> bool:
    """Returns whether a row of results or a contestant is a segmenter's, which also counts its backbone alone."""
    return "backbone_macs_ratio" in row or "backbone_gmacs" in row


def _environment_text(report: dict[str, Any], passes: list[str]) -> str:
    driver = f", driver {report['driver']}" if report["driver"] else ""
    scans = f", scans by {report['implementation']}" if report["implementation"] else ""
    (height, width), method, has_heads = report["img_size"], report["method"], _has_heads(report["contestants"][0])
    name = f"{report['model']} with UPerNet's heads, {report['num_classes']} classes," if has_heads else report["model"]
    both = ", of the whole model / of its backbone alone" if has_heads else ""
    lines = [
        f"{name} at {height} x {width}, {report['dtype']}{scans}; {report['device']} "
        f"({report['platform']}, {report['cores']} cores){driver}; {report['date']}",
        ", ".join(f"{name} {version}" for name, version in report["packages"].items()),
        f"{method['timing']}; {method['warm_up']}.",
        f"Weights: {method['weights']}.",
        *(f"{which}: {report['passes'][which]}." for which in passes),
        f"Medians (quartiles). Speed-up: dense time / own time of each round. MACs: dense / own, by convention{both}.",
    ]
    return "\n".join(lines)


def _contestants_text(report: dict[str, Any]) -> str:
    contestants = report["contestants"]
    descriptions = [f"{row['contestant']}: {row['what']}" for row in contestants]
    columns = ["", "parameters", *_macs_columns(report, "GMACs"), "tokens, last block"]
    rows = [
        [row["contestant"], f"{row['parameters']:,}", *_macs(row, "gmacs", ".4g"), str(row["tokens_per_block"][-1])]
        for row in contestants
    ]
    return "\n".join([*descriptions, "", markdown(columns, rows)])


def _pass_text(report: dict[str, Any], which: str) -> str:
    columns = [which, "batch", "ms", "img/s", "speed-up", *_macs_columns(report, "MACs"), "MiB", "pruning"]
    rows = []
    for row in (row for row in report["rows"] if row["pass"] == which):
        cells = [row["contestant"], str(row["batch"])]
        if "error" in row:
            cells += [_NOTHING] * (len(columns) - 3) + ["out of memory" if row["out_of_memory"] else "failed"]
        else:
            cells += [
                _spread(row["median_ms"], row["quartiles_ms"]),
                _spread(row["images_per_s"], row["images_per_s_quartiles"]),
                _speedup(row) if "speedup" in row else _NOTHING,
                *_macs(row, "macs_ratio", ".2f"),
                f"{row['program_mib']:.0f}" if "program_mib" in row else _NOTHING,
                row.get("verdict", _NOTHING),
            ]
        rows.append(cells)
    return markdown(columns, rows)


def _limits_text(report: dict[str, Any]) -> str:
    """Returns the limits of the measurement: the largest batch sizes, and the parts that were left out."""
    memory, load = report["memory_limit_mib"], report["load_average"]
    limits = f"{report['budget_s']:.0f} s" + (f" and {memory} MiB for a program" if memory else "")
    lines = [f"Budget: {limits}; used {report['seconds']:.0f} s."]
    if load["start"] is not None:
        lines.append(
            f"Load average {load['start']} at the start, {load['end']} at the end, on {report['cores']} cores."
        )
    if peaks := [row["process_peak_mib"] for row in report["rows"] if "process_peak_mib" in row]:
        lines.append(f"Peak memory of this process on the device: {max(peaks):.0f} MiB.")
    for largest in report["largest_batch"]:
        if largest["out_of_memory_at"]:
            ran = f"{largest['batch']} fits" if largest["batch"] else "no size was measured"
            where = f"{largest['pass']}, {largest['contestant']}"
            lines.append(f"{where}: {ran}, {largest['out_of_memory_at']} does not.")
    for row in report["skipped"]:
        everyone = len(row["contestants"]) == len(report["contestants"])
        who = "everything" if everyone else "; ".join(row["contestants"])
        larger = " and above" if row.get("and_larger") else ""
        where = f"{row['pass']}, batch {row['batch']}{larger}, " if "batch" in row else ""
        lines.append(f"Skipped: {where}{who}: {row['reason']}.")
    return "\n".join(lines)


def _macs_columns(report: dict[str, Any], what: str) -> list[str]:
    """Returns the headings of the columns of `_macs`, one per convention."""
    dense = report["contestants"][0]
    alone = " / backbone" if _has_heads(dense) else ""
    return [f"{what}, {convention}{alone}" for convention in dense["gmacs"]]


def _macs(row: dict[str, Any], key: str, form: str) -> list[str]:
    """Returns a count or ratio of the whole model and, for a segmenter, also of its backbone, by convention."""
    counts = [row[name] for name in (key, f"backbone_{key}") if name in row]
    return [" / ".join(format(count[convention], form) for count in counts) for convention in row[key]]


def _spread(median: float, quartiles: list[float]) -> str:
    """Returns a median and its quartiles, each with three digits or more."""
    shown, low, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in (median, *quartiles))
    return f"{shown} ({low} .. {high})"


def _speedup(row: dict[str, Any]) -> str:
    low, high = row["speedup_quartiles"]
    return f"{row['speedup']:.2f} ({low:.2f} .. {high:.2f})"
