"""Memory of a compiled program as XLA plans it, the most memory used so far, and errors that mean a lack of memory."""

from __future__ import annotations

import sys

import jax


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the memory of one call of a compiled program on each device, as XLA planned it.

    Args:
        compiled: such as `jax.jit(step, donate_argnums=0).lower(state, batch).compile()`.

    Returns:
        Bytes by kind; empty if the backend reports nothing:

            arguments     inputs; for a training step, the state and the batch
            outputs       results
            temporaries   activations kept for the gradient, and work space
            donated       outputs that reuse the memory of a donated argument
            total         arguments + outputs + temporaries - donated
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return {}
    bytes_of = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "donated": plan.alias_size_in_bytes,
    }
    taken = bytes_of["arguments"] + bytes_of["outputs"] + bytes_of["temporaries"]
    return {**bytes_of, "total": taken - bytes_of["donated"]}


def peak_memory() -> dict[str, int | str] | None:
    """Returns the most memory used so far.

    Returns:
        `of` ("device" or "process") and `bytes`. On an accelerator: the peak of this process's fullest device, by its
        allocator, and `limit`, that device's memory in bytes, where the backend reports it. On a CPU, whose allocator
        keeps no peak: the peak resident set of the process, including Python, libraries and the host's data. None where
        neither is known (Windows).
    """
    counted = [stats for device in jax.local_devices() if "peak_bytes_in_use" in (stats := device.memory_stats() or {})]
    if not counted:
        resident = _peak_resident_bytes()
        return None if resident is None else {"of": "process", "bytes": resident}
    fullest = max(counted, key=lambda stats: stats["peak_bytes_in_use"])
    limit = {"limit": fullest["bytes_limit"]} if "bytes_limit" in fullest else {}
    return {"of": "device", "bytes": fullest["peak_bytes_in_use"], **limit}


def out_of_memory(problem: Exception) -> bool:
    """Returns whether an exception, XLA's or ours, means that memory does not suffice."""
    return isinstance(problem, MemoryError) or "RESOURCE_EXHAUSTED" in str(problem)


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB
