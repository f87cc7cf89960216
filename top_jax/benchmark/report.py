"""Where and with what a report was made, its tables for a terminal, and its file, whole at any moment."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any, Final

import jax

from top_jax.benchmark.floor import nvidia_smi
from top_jax.errors import InputError
from top_jax.ops import implementations

PACKAGES: Final = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "triton", "jax-triton", "top-jax")


def environment() -> dict[str, Any]:
    """Device, driver, versions and date. Packages that are not installed have no version."""
    device, card = implementations.device(), nvidia_smi()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "compute_capability": str(getattr(device, "compute_capability", "")) or None,
        "driver": card.get("driver_version"),
        "nvidia_smi": card,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        # `default` lets a GPU multiply float32 matrices in TF32.
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_whole(file: Path, content: Any) -> None:
    """Writes JSON so that a kill at any moment leaves the old file or the new one.

    Raises:
        InputError: it cannot be written there.
    """
    beside = file.with_name(f"{file.name}.part")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, file)
    except OSError as error:
        if beside.is_file():
            beside.unlink()
        raise InputError(f"{file} cannot be written ({error.strerror}); choose another file with --out.") from error


def publish(rows: list[dict[str, Any]], out: Path | None, **about: Any) -> None:
    """Prints rows as a table, and writes them with the machine, and what they are about, to `out`."""
    print(table(rows))
    if out is not None:
        write_whole(out, {"environment": environment(), **about, "rows": rows})


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns, with `error` or `absent` at the end of the line; how often was measured is left out."""
    problems, left_out = ("error", "absent"), ("rounds", "calls")
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in (*problems, *left_out)]
    if not keys:
        return ""
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    notes = ["", *(next((f"  {name}: {row[name]}" for name in problems if name in row), "") for row in rows)]
    lines = []
    for line, note in zip(cells, notes, strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append((text + note).rstrip())
    return "\n".join(lines)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Rows of texts as a Markdown table that is aligned to be read as it is; all but the first column to the right."""
    widths = [max(3, *(len(line[place]) for line in (columns, *rows))) for place in range(len(columns))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = []
    for line in (columns, rule, *rows):
        first, *rest = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        lines.append(f"| {' | '.join((first.strip().ljust(widths[0]), *rest))} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return " .. ".join(_cell(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
