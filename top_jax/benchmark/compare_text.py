"""The report of `compare` as Markdown: who was timed, a table for each pass, and where pruning does not pay."""

from __future__ import annotations

from typing import Any, Final

from top_jax.benchmark.report import markdown

_NONE: Final = "-"


def text(report: dict[str, Any]) -> str:
    """All of it, for a terminal or a file."""
    parts = [_where(report), _contestants(report)]
    parts += [_pass(report, which) for which in dict.fromkeys(row["pass"] for row in report["rows"])]
    return "\n\n".join([*parts, _limits(report), _words(report)])


def _where(report: dict[str, Any]) -> str:
    driver = f", driver {report['driver']}" if report["driver"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    height, width = report["img_size"]
    scans = f", scans by {report['implementation']}" if report["implementation"] else ""
    method = report["method"]
    return "\n".join(
        [
            f"{report['model']} at {height} x {width}, {report['dtype']}{scans}; {report['device']} "
            f"({report['platform']}, {report['cores']} cores){driver}; {report['date']}",
            versions,
            f"{method['timing']}; {method['warm_up']}.",
            f"Weights: {method['weights']}.",
            "Medians (quartiles). Times dense: of each round dense time / own time; MACs: dense / own, by convention.",
        ]
    )


def _contestants(report: dict[str, Any]) -> str:
    conventions = list(report["contestants"][0]["gmacs"])
    columns = ["", "parameters", *(f"GMACs, {name}" for name in conventions), "tokens, last block"]
    rows = [
        [
            row["contestant"],
            f"{row['parameters']:,}",
            *(f"{row['gmacs'][name]:.4g}" for name in conventions),
            str(row["tokens_per_block"][-1]),
        ]
        for row in report["contestants"]
    ]
    what = [f"{row['contestant']}: {row['what']}" for row in report["contestants"]]
    return "\n".join([*what, "", markdown(columns, rows)])


def _pass(report: dict[str, Any], which: str) -> str:
    conventions = list(report["contestants"][0]["gmacs"])
    columns = [
        which,
        "batch",
        "ms",
        "img/s",
        "times dense",
        *(f"MACs, {name}" for name in conventions),
        "MiB",
        "pruning",
    ]
    rows = []
    for row in (row for row in report["rows"] if row["pass"] == which):
        begin = [row["contestant"], str(row["batch"])]
        if "error" in row:
            reason = "out of memory" if row["out_of_memory"] else "failed"
            rows.append([*begin, *[_NONE] * (len(columns) - 3), reason])
            continue
        rows.append(
            [
                *begin,
                _spread(row["median_ms"], row["quartiles_ms"]),
                _spread(row["images_per_s"], row["images_per_s_quartiles"]),
                _speedup(row) if "speedup" in row else _NONE,
                *(f"{row['macs_ratio'][name]:.2f}" for name in conventions),
                f"{row['program_mib']:.0f}" if "program_mib" in row else _NONE,
                row.get("verdict", _NONE),
            ]
        )
    return markdown(columns, rows)


def _limits(report: dict[str, Any]) -> str:
    """Where the batch sizes ended, and what was left out."""
    memory = report["memory_limit_mib"]
    bounds = f"{report['budget_s']:.0f} s" + (f" and {memory} MiB for a program" if memory else "")
    lines = [f"Budget: {bounds}; used {report['seconds']:.0f} s."]
    load = report["load_average"]
    if load["start"] is not None:
        lines.append(
            f"Load average {load['start']} at the start, {load['end']} at the end, on {report['cores']} cores."
        )
    peaks = [row["process_peak_mib"] for row in report["rows"] if "process_peak_mib" in row]
    if peaks:
        lines.append(f"Most memory that the process had on the device: {max(peaks):.0f} MiB.")
    for largest in report["largest_batch"]:
        if largest["out_of_memory_at"]:
            ran = f"{largest['batch']} fits" if largest["batch"] else "no size was measured"
            where = f"{largest['pass']}, {largest['contestant']}"
            lines.append(f"{where}: {ran}, {largest['out_of_memory_at']} does not.")
    lines += [_skipped(row, report) for row in report["skipped"]]
    return "\n".join(lines)


def _skipped(row: dict[str, Any], report: dict[str, Any]) -> str:
    names = row["contestants"]
    who = "everything" if len(names) == len(report["contestants"]) else "; ".join(names)
    where = (
        f"{row['pass']}, batch {row['batch']}{' and above' if row['and_larger'] else ''}, " if "batch" in row else ""
    )
    return f"Skipped: {where}{who}: {row['reason']}."


def _words(report: dict[str, Any]) -> str:
    if not report["conclusions"]:
        return "No pruned model was timed beside the dense one."
    return "\n".join(["Where pruning does not pay:", *(f"  {line}" for line in report["conclusions"])])


def _spread(median: float, quartiles: list[float]) -> str:
    return f"{_short(median)} ({_short(quartiles[0])} .. {_short(quartiles[1])})"


def _speedup(row: dict[str, Any]) -> str:
    low, high = row["speedup_quartiles"]
    return f"{row['speedup']:.2f} ({low:.2f} .. {high:.2f})"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
