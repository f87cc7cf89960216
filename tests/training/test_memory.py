"""Memory of a step by hand, and the peak from the device or, where it keeps none, from the process."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from top_jax.memory import peak_memory, program_memory


@pytest.mark.parametrize("donate", [(), (0,)])
def test_program_memory_by_hand(donate):
    """A state of 400 bytes that is moved, and a batch of 80 bytes that is read."""
    state, batch = jax.ShapeDtypeStruct((100,), jnp.float32), jax.ShapeDtypeStruct((20,), jnp.float32)
    compiled = jax.jit(lambda s, b: s + b.sum(), donate_argnums=donate).lower(state, batch).compile()
    found = program_memory(compiled)
    assert (found["arguments"], found["outputs"]) == (480, 400)
    assert found["donated"] == (400 if donate else 0)
    assert found["total"] == 480 + 400 + found["temporaries"] - found["donated"]


def test_temporaries_are_what_lies_between():
    """An outer product that is sorted does not fit into the output: it is kept on the way."""
    compiled = jax.jit(lambda x: jnp.sort(x[:, None] * x).sum()).lower(jnp.ones(1000)).compile()
    assert program_memory(compiled)["temporaries"] >= 4_000_000
    assert program_memory(compiled)["outputs"] == 4


def test_a_backend_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    assert program_memory(jax.jit(jnp.sin).lower(1.0).compile()) == {}


def test_peak_of_the_fullest_device(monkeypatch):
    stats = [None, {"peak_bytes_in_use": 5, "bytes_limit": 10}, {"peak_bytes_in_use": 7, "bytes_limit": 20}]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory() == {"of": "device", "bytes": 7, "limit": 20}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the other count is Linux's")
def test_peak_of_the_process(monkeypatch):
    """The kernel reports the same peak in /proc."""
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    found = peak_memory()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    assert found is not None and found["of"] == "process"
    assert found["bytes"] == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_peak_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() is None
