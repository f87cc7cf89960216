"""What `auto` runs and logs; a named implementation runs or raises."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.errors import InputError
from top_jax.kernels import blocks
from top_jax.ops import implementations, selective_scan


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A function that makes the default device a GPU with or without a working jax-triton and a tuning table."""
    monkeypatch.setattr(blocks, "TUNING", tmp_path)
    blocks.read_table.cache_clear()

    def make(kind="NVIDIA H200", capability="9.0", jax_triton=None, table=None):
        gpu = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(implementations, "device", lambda: gpu)
        monkeypatch.setattr(implementations, "problem_with_jax_triton", lambda: jax_triton)
        if table is not None:
            blocks.table_path(kind).write_text(json.dumps(table))

    yield make
    blocks.read_table.cache_clear()


MISSING = "jax-triton is not installed: pip install 'top-jax[cuda]'"


TABLE = {"date": "2026-11-23", "kernels": blocks.KERNELS, "blocks": {}}


@pytest.mark.parametrize(
    "machine, name, why, fix",
    [
        ({}, "triton", "NVIDIA H200", "--tune"),
        ({"jax_triton": MISSING}, "pallas", MISSING, "pip install"),
        ({"table": {**TABLE, "fastest_first": ["pallas", "triton"]}}, "pallas", "2026-11-23", None),
        (
            {"jax_triton": MISSING, "table": {**TABLE, "fastest_first": ["triton", "pallas"]}},
            "pallas",
            MISSING,
            "pip install",
        ),
        ({"table": {**TABLE, "fastest_first": ["pallas", "xla"]}}, "pallas", "triton", "--tune"),
        ({"table": {**TABLE, "fastest_first": ["xla", "triton", "pallas"]}}, "xla", "2026-11-23", None),
        ({"table": {**TABLE, "kernels": 1, "fastest_first": ["xla"]}}, "triton", "of earlier kernels", "--tune"),
        ({"capability": "7.5"}, "xla", "7.5", None),
        ({"kind": "AMD Instinct MI300X", "capability": "gfx942"}, "xla", "gfx942", None),
    ],
)
def test_auto_on_a_gpu(pretend, machine, name, why, fix):
    pretend(**machine)
    choice = implementations.choose()
    assert choice.name == name and why in choice.why
    assert (choice.fix is None) if fix is None else (fix in choice.fix)


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_damaged_tuning_table(pretend, text):
    pretend()
    blocks.table_path("NVIDIA H200").write_text(text)
    with pytest.raises(InputError, match="nvidia-h200.json"):
        implementations.choose()


def test_a_gpu_without_its_kernel_gets_one_warning(pretend, caplog):
    pretend(capability="7.5")
    implementations._log.cache_clear()
    with caplog.at_level(logging.INFO, logger="absl"):
        assert {implementations.resolve("auto") for _ in range(2)} == {"xla"}
    (record,) = [record for record in caplog.records if "'auto' runs" in record.message]
    assert record.levelno == logging.WARNING
    assert "'xla'" in record.message and "7.5" in record.message


def test_auto_on_a_cpu_runs_xla_and_says_so_once(caplog):
    if implementations.device().platform != "cpu":
        pytest.skip("the default device is no CPU")
    implementations._log.cache_clear()
    scan = {name: jnp.ones((1, 2, 3)) for name in ("u", "delta", "B", "C")} | {"A": -jnp.ones((3, 3))}
    with caplog.at_level(logging.INFO, logger="absl"):
        first, second = selective_scan(**scan), selective_scan(**scan, implementation="auto")
    (message,) = [message for message in caplog.messages if "'auto' runs" in message]
    assert "'xla'" in message and "cpu" in message
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", implementations.KERNELS)
def test_a_named_kernel_never_falls_back(name):
    if implementations.device().platform != "cpu":
        pytest.skip("the default device is no CPU")
    with pytest.raises(InputError, match=f"implementation='{name}' .* cpu"):
        implementations.resolve(name)


def test_triton_without_jax_triton(pretend):
    pretend(jax_triton=MISSING)
    with pytest.raises(InputError, match=f"'triton' .*{re.escape(MISSING)}"):
        implementations.resolve("triton")


def test_the_default_device_is_followed():
    with jax.default_device(jax.devices("cpu")[0]):
        assert implementations.device().platform == "cpu"
    with jax.default_device("cpu"):
        assert implementations.device().platform == "cpu"
