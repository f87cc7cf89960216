"""Imports point one way (CONTRIBUTING.md, "Where things live").

cli -> ablation, benchmark -> training, figures -> evaluation -> models -> pruning, ops -> kernels -> jax
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Part of the project -> the parts it may import. Those of EVERYONES may be imported anywhere.
ALLOWED = {
    "kernels": set(),
    "ops": {"kernels"},
    "pruning": {"ops"},
    "models": {"ops", "pruning"},
    "config": set(),
    "recipes": {"config"},
    "build": {"config", "models", "pruning"},
    "convert": {"models", "pruning"},
    "data": {"config"},
    "zoo": {"build", "config", "convert", "models", "pruning", "training"},
    "evaluation": {"build", "config", "data", "models", "ops", "pruning", "sharding", "distributed"},
    "figures": {"data", "evaluation", "models", "pruning"},
    "training": {
        "build",
        "config",
        "convert",
        "data",
        "evaluation",
        "models",
        "ops",
        "pruning",
        "sharding",
        "distributed",
    },
    "ablation": {"build", "config", "data", "evaluation", "figures", "models", "pruning", "sharding", "training"},
    "inference": {"build", "config", "convert", "data", "evaluation", "models", "training"},
    "benchmark": {"build", "config", "evaluation", "kernels", "models", "ops", "pruning", "training"},
    "cli": {
        "ablation",
        "benchmark",
        "build",
        "config",
        "convert",
        "data",
        "distributed",
        "evaluation",
        "figures",
        "inference",
        "models",
        "ops",
        "pruning",
        "sharding",
        "training",
    },
}
EVERYONES = {"environment", "errors", "files", "memory", "optional", "tables", "typing", "values", "version"}
LIGHT = {
    "kernels": {"jax", "numpy"},
    "ops": {"jax", "numpy", "absl"},
    "pruning": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax", "einops"},
    "benchmark": {"jax", "numpy", "flax", "optax"},
}
HEAVY = ("tensorflow_datasets", "grain", "ml_collections", "tensorboardX", "jax_triton", "triton", "torch")


def files_of(root: Path, part: str) -> list[Path]:
    place = root / "kernels" if part == "kernels" else root / "top_jax" / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files, f"no Python files under {place}"
    return files


def imported(path: Path, *, at_load: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or (`at_load`) outside its functions."""
    names, todo = set(), [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path} imports from outside its folder without naming it"
            here = f"top_jax.{path.parent.name}." if node.level else ""
            names |= {f"{here}{node.module}.{alias.name}" for alias in node.names}
        if not (at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            todo.extend(ast.iter_child_nodes(node))
    return names


def test_every_part_has_its_place(root):
    parts = {path.parent.name for path in (root / "top_jax").glob("*/__init__.py")}
    assert parts | {"kernels", "config", "recipes", "build", "inference", "zoo"} == ALLOWED.keys()


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(root, part):
    for path in files_of(root, part):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("top_jax.")}
        assert used <= ALLOWED[part] | EVERYONES | {part}, path


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_need_little(root, part):
    for path in files_of(root, part):
        tops = {name.split(".")[0] for name in imported(path, at_load=True)}
        if path.name == "triton_kernels.py":  # which nobody imports at load
            tops -= {"triton"}
        assert tops - set(sys.stdlib_module_names) <= LIGHT[part] | {"top_jax"}, path


def test_only_what_draws_loads_matplotlib(root):
    """It takes a second, which no other command should pay for."""
    for path in (root / "top_jax").rglob("*.py"):
        tops = {name.split(".")[0] for name in imported(path, at_load=True)}
        assert "matplotlib" not in tops or path.parent.name in ("figures", "ablation"), path


def test_light_parts_load_without_the_rest(root, tmp_path):
    program = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # importing it now fails
import top_jax.models, top_jax.ops, top_jax.pruning, top_jax.kernels.blocks
import top_jax.cli.benchmark, top_jax.benchmark.suite, top_jax.benchmark.tuning  # on a borrowed GPU
import top_jax.benchmark.compare
import top_jax
top_jax.create_model, top_jax.Pruning, top_jax.ops.selective_scan
try:
    import grain
except ImportError:
    print("blocked")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment(root), cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "blocked"


def clean_environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
