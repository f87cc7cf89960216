"""Environment of a run or a measurement: versions, devices, git revision and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import jax

from top_jax.version import __version__

PACKAGES: Final = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "pillow",
    "torch",
    "triton",
    "jax-triton",
)
_SMI_QUERY: Final = ("name", "driver_version", "clocks.max.sm", "clocks.sm", "power.limit")


def environment() -> dict[str, Any]:
    """Returns versions, devices, git revision and date, which it takes to repeat a run or a measurement.

    Returns:
        JSON values. `packages` leaves out what is not installed; `device` is JAX's name of the first device; `driver`
        and `nvidia_smi` are empty without an NVIDIA GPU; `git` is None for an installed package.

    Raises:
        RuntimeError: JAX finds no device.
    """
    device, card = jax.devices()[0], nvidia_smi()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "top_jax": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "compute_capability": str(getattr(device, "compute_capability", "")) or None,
        "driver": card.get("driver_version"),
        "nvidia_smi": card,
        "processor": _processor(),
        "cores": os.cpu_count(),
        # With `default` a GPU multiplies float32 matrices in TF32.
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
    }


def nvidia_smi() -> dict[str, str]:
    """Returns name, driver, highest and current SM clock (MHz) and power limit (W) of the first GPU; else `problem`."""
    if shutil.which("nvidia-smi") is None:
        return {"problem": "nvidia-smi is not there"}
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    first = done.stdout.strip().splitlines()[:1]
    return dict(zip(_SMI_QUERY, (value.strip() for value in first[0].split(",")), strict=False)) if first else {}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Returns the processor's name, on Linux, or else the machine's architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_revision() -> str | None:
    """Returns the checkout's commit, with "-dirty" if files are changed; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
