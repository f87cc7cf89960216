"""A GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def fake_h200(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An H200 that `auto` and the suite believe in, with `problems` of implementations; nothing can be run on it."""
    device = SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H200",
        compute_capability="9.0",
        core_count=132,
        memory_stats=lambda: {"bytes_limit": 100 * 2**30},
        problems={},
    )
    monkeypatch.setattr("top_jax.ops.implementations.device", lambda: device)
    monkeypatch.setattr("top_jax.ops.implementations.obstacle", lambda name: device.problems.get(name))
    return device


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """An empty folder for tuning tables, used instead of the package's."""
    from top_jax.kernels import blocks

    monkeypatch.setattr(blocks, "TUNING", tmp_path / "tuning")
    blocks.read_table.cache_clear()
    yield tmp_path / "tuning"
    blocks.read_table.cache_clear()
