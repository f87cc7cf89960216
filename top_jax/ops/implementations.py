"""Which implementation runs, and why: a named one runs or raises; `auto` chooses by device and tuning table."""

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
from top_jax.kernels.operands import ScanOperands, ScanPlan
from top_jax.kernels.triton_scan import triton_forward
from top_jax.ops.reference import selective_scan_reference
from top_jax.ops.xla import selective_scan_xla

PLAIN: Final = {"reference": selective_scan_reference, "xla": selective_scan_xla}  # any device, one direction
# Best guess first: the order in which `auto` tries them on a GPU that was never measured.
KERNELS: Final = ("triton", "pallas")
IMPLEMENTATIONS: Final = ("auto", *PLAIN, "pallas", "pallas_interpret", "triton")
_INSTALL: Final = "pip install 'top-jax[cuda]'"
_TUNE: Final = "python -m top_jax.cli.benchmark --tune"
_OLDEST_CAPABILITY: Final = 8.0  # what the kernels are compiled for in the tests: sm_80 and sm_90


class Choice(NamedTuple):
    """What `auto` runs.

    Attributes:
        name: the implementation.
        why: the reason, to print.
        fix: the command that would get a faster one, or None.
    """

    name: str
    why: str
    fix: str | None


def resolve(implementation: str) -> str:
    """The name of the implementation that runs on this machine's default device.

    Raises:
        InputError: an unknown name, or one that cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "auto":
        choice = choose()
        _log(choice)
        return choice.name
    problem = obstacle(implementation)
    if problem:
        raise InputError(f"implementation={implementation!r} cannot run here: {problem}; or use 'auto' or 'xla'.")
    return implementation


def choose() -> Choice:
    """What `auto` runs on the default device, and why.

    Raises:
        InputError: the device's tuning table is damaged.
    """
    gpu = device()
    if gpu.platform != "gpu":
        return Choice("xla", f"the device is a {gpu.platform}, and the kernels are for GPUs", None)
    table = blocks.read_table(gpu.device_kind)
    order = KERNELS if table is None else tuple(table["fastest_first"])
    problems = {name: obstacle(name) for name in order if name in IMPLEMENTATIONS}
    best = next((name for name in problems if not problems[name]), "xla")
    untuned = [name for name in KERNELS if name not in order and obstacle(name) is None]
    why = [f"{name} cannot run: {problem}" for name, problem in problems.items() if problem]
    if table is None:
        why.append(f"there is no tuning table for {gpu.device_kind}")
    elif not why:
        why.append(f"measured fastest on {table['date']}")
    why += [f"{name} is not in the tuning table" for name in untuned]
    if any(problem and _INSTALL in problem for problem in problems.values()):
        fix = _INSTALL
    else:
        fix = _TUNE if best in KERNELS and (table is None or untuned) else None
    return Choice(best, "; ".join(why), fix)


def obstacle(implementation: str) -> str | None:
    """Why an implementation cannot run on the default device, and what to do about it; None if it can."""
    if implementation not in KERNELS:
        return None
    gpu = device()
    if gpu.platform != "gpu":
        return f"it needs an NVIDIA GPU and the default device is a {gpu.platform} (where there is one: {_INSTALL})"
    capability = str(getattr(gpu, "compute_capability", "unknown"))
    if not re.fullmatch(r"\d+\.\d+", capability):  # an AMD GPU says gfx...
        return f"it needs an NVIDIA GPU, and this one is a {gpu.device_kind} (compute capability {capability})"
    if float(capability) < _OLDEST_CAPABILITY:
        return f"it needs compute capability {_OLDEST_CAPABILITY}, and this {gpu.device_kind} has {capability}"
    return problem_with_jax_triton() if implementation == "triton" else None


@functools.cache
def problem_with_jax_triton() -> str | None:
    """Its releases follow those of JAX and Triton closely, so a tiny scan is lowered; nothing is launched."""
    if importlib.util.find_spec("jax_triton") is None:
        return f"jax-triton is not installed: {_INSTALL}"
    tokens, states = jax.ShapeDtypeStruct((1, 1, 1, 1), "float32"), jax.ShapeDtypeStruct((1, 1, 1), "float32")
    channel = jax.ShapeDtypeStruct((1, 1), "float32")
    operands = ScanOperands(tokens, tokens, states, tokens, tokens, channel, channel, None, None, None)
    forward = functools.partial(triton_forward, plan=ScanPlan((False,)), blocks=blocks.by_rule("triton", 1, 1))
    lower = lambda: (  # noqa: E731
        jax.jit(functools.partial(forward, save=False)).trace(operands).lower(lowering_platforms=("cuda",))
    )
    try:
        with ThreadPoolExecutor(1) as elsewhere:  # where no trace and no mesh of the caller's is in force
            elsewhere.submit(lower).result()
    except Exception as error:  # whatever a release that does not fit this JAX raises
        told = " ".join(str(error).split())[:200]
        return f"jax-triton does not work with JAX {jax.__version__} ({type(error).__name__}: {told}): {_INSTALL}"
    return None


@functools.cache  # so that a choice is logged once
def _log(choice: Choice) -> None:
    fix = f" To mend it: {choice.fix}" if choice.fix else ""
    # A GPU that runs without a kernel, for whatever reason, is worth a shout.
    shout = choice.name == "xla" and "cannot run" in choice.why
    log = logging.warning if shout else logging.info
    log("selective_scan: implementation 'auto' runs %r: %s.%s", choice.name, choice.why, fix)


def device_kind() -> str:
    """JAX's name of the default device, such as `NVIDIA H200`."""
    return device().device_kind


def device() -> Any:
    """The default `jax.Device`, as `jax.default_device` and the environment leave it.

    Choices are made for it, wherever the arrays of a call lie.

    Raises:
        InputError: JAX finds none, such as where JAX_PLATFORMS names what is not there.
    """
    default: Any = jax.config.jax_default_device  # pyright: ignore
    if isinstance(default, str):  # the name of a platform
        return _first_device(default)
    return default or _first_device(None)


def _first_device(platform: str | None) -> Any:
    try:
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError) as error:  # as JAX has it, by version
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms!r}"  # pyright: ignore[reportAttributeAccessIssue]
        told = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"JAX finds no device with {asked} ({told}); unset it, or install what it names.") from error
