"""Two trained-like checkpoints of the tiny model, and an ablation of them; nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from top_jax.ablation import base_pruning, make_grid, run_ablation
from top_jax.build import build_abstract_model
from top_jax.config import PruningConfig
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import save_weights


@pytest.fixture(scope="session", autouse=True)
def no_compilation_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("top_jax.ablation.run", "top_jax.training.loop"):
            patch.setattr(f"{module}.enable_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def quick_programs() -> Iterator[None]:
    """Compiles in half the time, which is most of what these tests do; the numbers are those of slower code."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def config(tiny_config: Any) -> Any:
    return dataclasses.replace(tiny_config, optimizer=dataclasses.replace(tiny_config.optimizer, ema_decay=None))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, config: Any) -> list[Path]:
    """Weights large enough that pruning changes what is predicted."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        shapes = weights_of(build_abstract_model(config.model))
        weights = jax.tree.map(lambda a: (rng.normal(size=a.shape) / 3).astype(a.dtype), shapes)  # noqa: B023
        run = RunDirectory(folder / f"seed{seed}")
        dense = dataclasses.replace(config, seed=seed, pruning=PruningConfig())
        run.claim(dense)
        save_weights(run, weights, which=("best",))
        found.append(run.path)
    return found


@dataclasses.dataclass
class Ablation:
    """A finished one, and how to start it again."""

    config: Any
    checkpoints: list[Path]
    out: Path
    said: list[str]
    base: Any
    grid: tuple[Any, ...]

    def run(self, checkpoints: list[Path] | None = None, **changes: Any) -> list[dict[str, Any]]:
        arguments = {"base": self.base, "say": self.said.append, **changes}
        config, grid = arguments.pop("config", self.config), arguments.pop("grid", self.grid)
        out = arguments.pop("out", self.out)
        return run_ablation(config, checkpoints or self.checkpoints, grid, out, **arguments)


@pytest.fixture(scope="module")
def finished(
    quick_programs: None, tmp_path_factory: pytest.TempPathFactory, config: Any, checkpoints: list[Path]
) -> Ablation:
    """Dense, both orders of `none`, and `hold` by clip, l2 and two seeds of random: three programs."""
    base = base_pruning(config)
    grid = make_grid(
        base,
        tables=("alignment", "score"),
        alignments=("none:score", "none", "hold"),
        scores=("clip", "l2", "random"),
        random_seeds=2,
    )
    ablation = Ablation(config, checkpoints, tmp_path_factory.mktemp("ablation") / "out", [], base, grid)
    ablation.run()
    return ablation
