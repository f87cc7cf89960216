"""What every test shares: paths, skips by name, and the line that counts what was skipped.

`.ci/run` also checks the annotations of `top_jax` at run time, by jaxtyping and beartype: `--jaxtyping-packages`.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compilation

# Set before JAX reads it. XLA_FLAGS="" in the environment optimises everything. On a machine with a GPU the flags
# would also change the code for the GPU, so they are not set there.
if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    os.environ.setdefault("XLA_FLAGS", compilation.XLA_FLAGS)

import jax
import jaxtyping
import numpy as np
import pytest
from runs import TINY_CONFIG, Launcher

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
# Folders whose code promises explicit dtypes and ranks: implicit promotion and broadcasting are errors there.
STRICT = ("convert", "kernels", "models", "ops", "pruning")
NEEDS = {
    "gpu": "needs a GPU (JAX finds none)",
    "torch": "needs PyTorch (the `convert` extra)",
    "triton": "needs Triton and PyTorch (the `kernels` extra)",
    "shared": "needs the folder ../shared beside the checkout",
}


_register_dataclass = jax.tree_util.register_dataclass


def _register_dataclass_unchecked(cls: type, *args: Any, **kwargs: Any) -> type:
    """JAX rebuilds pytrees around leaves of any kind (shapes, shardings, None), so their __init__ must take them."""
    registered = _register_dataclass(cls, *args, **kwargs)
    registered.__no_type_check__ = True
    return registered


jax.tree_util.register_dataclass = _register_dataclass_unchecked


def pytest_configure() -> None:
    gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that live: collecting them takes a tenth of the time
    # Triton reads this when it is imported, and any test may import it through PyTorch.
    if not _has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = set()
    if importlib.util.find_spec("torch") is None:
        lacking |= {"torch", "triton"}
    if importlib.util.find_spec("triton") is None:
        lacking.add("triton")
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        lacking.add("gpu")
    for item in items:
        for name in lacking:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=NEEDS[name]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints each reason for skipping once, with the number of tests."""
    reasons = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """tests/fixtures."""
    return FIXTURES


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared folder, where there is one: large data and the originals of the fixtures."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(NEEDS["shared"])
    return path


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    folder = request.path.relative_to(ROOT / "tests").parts[0]
    if folder not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Lets a wrong argument reach our own validation, as it does outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class OfficialCase:
    """One run of official PyTorch code: `weights` (state_dict), `config`, `image` (ours: [B, H, W, 3]), outputs."""

    def __init__(self, name: str):
        self.model_name = OFFICIAL_CASES[name]
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.config: dict[str, Any] = json.loads(str(self.arrays.pop("config")))
        self.config["img_size"] = _maybe_tuple(self.config["img_size"])
        self.weights = self.under("weights/")
        self.gradients = self.under("grad/")
        self.image = np.moveaxis(self.arrays["image_nchw"], 1, -1)
        self.grad_image = np.moveaxis(self.arrays["grad_image"], 1, -1)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    def build(self, **changes: Any) -> Any:
        """Our model with the case's weights."""
        # Imported here: what is above changes how the classes of top_jax are registered.
        from small_models import model_of_shapes

        from top_jax.convert import load_state_dict

        model = model_of_shapes(self.model_name, **{**self.config, **changes})
        load_state_dict(model, self.weights)
        return model


def _maybe_tuple(size: int | list[int]) -> int | tuple[int, ...]:
    return tuple(size) if isinstance(size, list) else size


# Which model's sizes each case overrides.
OFFICIAL_CASES = {
    "vim_micro": "vim_tiny",
    "vim_nonsquare_stride": "vim_tiny",
    "plain_mamba_micro": "plain_mamba_l1",
    "plain_mamba_nonsquare": "plain_mamba_l1",
    "deit_micro": "deit_tiny",
    "evit_micro": "deit_tiny",
}


@pytest.fixture(scope="session")
def official_case() -> Callable[[str], OfficialCase]:
    """A case by its name."""
    return functools.cache(OfficialCase)


@pytest.fixture(scope="session", params=["vim_micro", pytest.param("vim_nonsquare_stride", marks=pytest.mark.slow)])
def official(request: pytest.FixtureRequest, official_case: Callable[[str], OfficialCase]) -> OfficialCase:
    return official_case(request.param)


@pytest.fixture(scope="session")
def micro(official_case: Callable[[str], OfficialCase]) -> OfficialCase:
    return official_case("vim_micro")


@pytest.fixture(scope="session")
def tiny_config() -> Any:
    """The RunConfig of tests/tiny_run.py."""
    from top_jax.config import RunConfig

    spec = importlib.util.spec_from_file_location("tiny_run", TINY_CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return RunConfig.from_config_dict(module.get_config())


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Path:
    """The run directory of tests/tiny_run.py, trained without interruption; read-only.

    The first worker process trains it for all. `launcher` starts with its compiled programs: a copy, because JAX does
    not lock the folder.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished_run"
    folder.mkdir(exist_ok=True)
    workdir, compiled = folder / "run", folder / "compiled"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "stderr").exists():
            out, err = Launcher(compiled).finish(workdir)
            (workdir / "stdout").write_text(out)
            (workdir / "stderr").write_text(err)
    shutil.copytree(compiled, launcher.environment["JAX_COMPILATION_CACHE_DIR"], dirs_exist_ok=True)
    return workdir
