"""Chooses the implementation of the scan: a named one runs or raises; `auto` follows device and tuning table."""

from __future__ import annotations

import functools
import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import jax
from absl import logging

from top_jax.errors import InputError
from top_jax.kernels import blocks
from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.kernels.triton_scan import triton_forward
from top_jax.ops.reference import selective_scan_reference
from top_jax.ops.xla import selective_scan_xla
from top_jax.values import one_of

PLAIN: Final = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
}  # any device, one direction
# The order in which `auto` tries the kernels on a GPU without a tuning table.
KERNELS: Final = ("triton", "pallas")
IMPLEMENTATIONS: Final = ("auto", *PLAIN, "pallas", "pallas_interpret", "triton")
_INSTALL: Final = "pip install 'top-jax[cuda]'"
_TUNE: Final = "top-jax benchmark --tune"
_OLDEST_CAPABILITY: Final = 8.0  # the tests compile the kernels for sm_80 and sm_90


class AutoChoice(NamedTuple):
    """The implementation that `auto` runs.

    Attributes:
        name: the implementation.
        why: the reason, as text.
        fix: the command that would make a faster one available, or None.
    """

    name: str
    why: str
    fix: str | None


def resolve(implementation: str) -> str:
    """Returns the name of the implementation that runs on this machine's default device.

    Raises:
        InputError: an unknown name, or one that cannot run here.
    """
    one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "auto":
        choice = choose()
        _log(choice)
        return choice.name
    problem = obstacle(implementation)
    if problem:
        raise InputError(f"implementation={implementation!r} cannot run here: {problem}; or use 'auto' or 'xla'.")
    return implementation


def choose() -> AutoChoice:
    """Chooses the implementation that `auto` runs on the default device.

    Raises:
        InputError: the device's tuning table is damaged.
    """
    gpu = device()
    if gpu.platform != "gpu":
        return AutoChoice("xla", f"the device is a {gpu.platform}, and the kernels are for GPUs", None)
    table = blocks.read_table(gpu.device_kind)
    order = KERNELS if table is None else tuple(table["fastest_first"])
    problems = {name: obstacle(name) for name in order if name in IMPLEMENTATIONS}
    best = next((name for name in problems if not problems[name]), "xla")
    untuned = [name for name in KERNELS if name not in order and obstacle(name) is None]
    why = [f"{name} cannot run: {problem}" for name, problem in problems.items() if problem]
    if table is None:
        stale = blocks.table_path(gpu.device_kind).is_file()
        why.append(f"the tuning table for {gpu.device_kind} is {'of earlier kernels' if stale else 'missing'}")
    elif not why:
        why.append(f"measured fastest on {table['date']}")
    why += [f"{name} is not in the tuning table" for name in untuned]
    if any(problem and _INSTALL in problem for problem in problems.values()):
        fix = _INSTALL
    else:
        fix = _TUNE if best in KERNELS and (table is None or untuned) else None
    return AutoChoice(best, "; ".join(why), fix)


def obstacle(implementation: str) -> str | None:
    """Returns why an implementation cannot run on the default device, and what to do about it; None if it can."""
    if implementation not in KERNELS:
        return None
    gpu = device()
    if gpu.platform != "gpu":
        return f"it needs an NVIDIA GPU and the default device is a {gpu.platform} (on a machine with one: {_INSTALL})"
    capability = str(getattr(gpu, "compute_capability", "unknown"))
    if not re.fullmatch(r"\d+\.\d+", capability):  # an AMD GPU reports gfx...
        return f"it needs an NVIDIA GPU, and this one is a {gpu.device_kind} (compute capability {capability})"
    if float(capability) < _OLDEST_CAPABILITY:
        return f"it needs compute capability {_OLDEST_CAPABILITY}, and this {gpu.device_kind} has {capability}"
    return problem_with_jax_triton() if implementation == "triton" else None


@functools.cache
def problem_with_jax_triton() -> str | None:
    """Returns why jax-triton cannot be used, or None.

    Each release of jax-triton needs matching releases of JAX and Triton, so this lowers a tiny scan,
    without launching it.
    """
    if importlib.util.find_spec("jax_triton") is None:
        return f"jax-triton is not installed: {_INSTALL}"
    axes = {"u": 4, "delta": 4, "A": 3, "B": 4, "C": 4, "D": 2, "delta_bias": 2}
    shapes: dict[str, Any] = {name: jax.ShapeDtypeStruct((1,) * count, "float32") for name, count in axes.items()}
    forward = functools.partial(
        triton_forward, plan=ScanPlan((False,)), blocks=blocks.by_rule("triton", 1, 1), save=False
    )
    lower = lambda: jax.jit(forward).trace(ScanArguments(**shapes)).lower(lowering_platforms=("cuda",))  # noqa: E731
    try:
        with ThreadPoolExecutor(1) as pool:  # in a thread without the caller's trace and mesh
            pool.submit(lower).result()
    except Exception as error:  # an incompatible release may raise anything
        text = " ".join(str(error).split())[:200]
        return f"jax-triton does not work with JAX {jax.__version__} ({type(error).__name__}: {text}): {_INSTALL}"
    return None


@functools.cache  # so that a choice is logged once
def _log(choice: AutoChoice) -> None:
    fix = f" To get a faster one: {choice.fix}" if choice.fix else ""
    # A GPU without a working kernel deserves a warning.
    log = logging.warning if choice.name == "xla" and "cannot run" in choice.why else logging.info
    log("selective_scan: implementation 'auto' runs %r: %s.%s", choice.name, choice.why, fix)


def device_kind() -> str:
    """Returns JAX's name of the default device, such as `NVIDIA H200`."""
    return device().device_kind


def device() -> Any:
    """Returns the default `jax.Device`, as set by `jax.default_device` and the environment.

    The choice depends on it alone, wherever the arrays of a call are.

    Raises:
        InputError: JAX finds none, for instance because JAX_PLATFORMS names a missing platform.
    """
    default: Any = jax.config.jax_default_device  # pyright: ignore
    if isinstance(default, str):  # the name of a platform
        return _first_device(default)
    return default or _first_device(None)


def _first_device(platform: str | None) -> Any:
    try:
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError) as error:  # depends on the version of JAX
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms!r}"  # pyright: ignore[reportAttributeAccessIssue]
        reason = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise InputError(f"JAX finds no device with {asked}{reason}; unset it, or install that platform.") from error
