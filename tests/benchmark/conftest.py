"""A GPU that is not there, and models that compile in a moment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from top_jax.benchmark.contestants import Contestant, field_of
from top_jax.config import ModelConfig
from top_jax.pruning import Pruning

# A DeiT, because it compiles several times faster than a scan.
SMALL = {"img_size": (32, 32), "patch_size": 16, "embed_dim": 8, "num_heads": 1, "depth": 2, "num_classes": 3}


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Overrides of `deit_tiny`: two blocks, five tokens."""
    return SMALL


@pytest.fixture(scope="session")
def small_deit() -> ModelConfig:
    """That model."""
    return ModelConfig(name="deit_tiny", **SMALL)


@pytest.fixture(scope="session")
def micro_segmenter() -> ModelConfig:
    """Four blocks of ViM, 16 patches, three classes; it has the neck with transposed convolutions."""
    sizes = {"img_size": (32,), "patch_size": 8, "embed_dim": 8, "depth": 4, "d_state": 2}
    return ModelConfig(name="vim_tiny", head="uper", num_classes=3, channels=8, aux_channels=8, **sizes)


@pytest.fixture(scope="session")
def attentive() -> Pruning:
    """A reduction of that model."""
    return Pruning(after_blocks=(1,), keep_ratio=0.5, score="attention")


@pytest.fixture(scope="session")
def field(attentive: Pruning) -> list[Contestant]:
    """The dense model, the pruned one, and `large`, which has more weights than both."""
    large = field_of(ModelConfig(name="deit_tiny", **{**SMALL, "embed_dim": 128}), Pruning())[0][0]
    own, _ = field_of(ModelConfig(name="deit_tiny", **SMALL), attentive)
    return [*own, large._replace(name="large", weights="large")]


@pytest.fixture
def h200() -> Any:
    """An H200 as JAX would describe it, with `problems` of implementations; nothing can be run on it."""
    return SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H200",
        compute_capability="9.0",
        core_count=132,
        memory_stats=lambda: {"bytes_limit": 100 * 2**30},
        problems={},
    )


@pytest.fixture
def fake_h200(h200: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, found by `auto` and the suite."""
    monkeypatch.setattr("top_jax.ops.implementations.device", lambda: h200)
    monkeypatch.setattr("top_jax.ops.implementations.obstacle", lambda name: h200.problems.get(name))
    return h200


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """An empty folder for tuning tables, used instead of the package's."""
    from top_jax.kernels import blocks

    monkeypatch.setattr(blocks, "TUNING", tmp_path / "tuning")
    blocks.read_table.cache_clear()
    yield tmp_path / "tuning"
    blocks.read_table.cache_clear()
