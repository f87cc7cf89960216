"""README and the notebook: what they tell a user to type runs, in the order in which it stands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hub_server import serving

import top_jax
from top_jax.convert.official_files import OFFICIAL_FILES

CELL = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOTEBOOK = "examples/prune_and_look.ipynb"


def cells(page: Path, language: str) -> list[str]:
    return [text for kind, text in CELL.findall(page.read_text()) if kind == language]


def notebook_code(root: Path) -> list[str]:
    content = json.loads((root / NOTEBOOK).read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run(command: list[str], checkout: Path, **environment: str) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg", "PYTHONPATH": ".", **environment}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def checkout(root, tmp_path):
    """A folder with the files of the checkout, in which the commands may write."""
    for name in ("train.py", "configs", "docs", "top_jax", "kernels", "examples"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def test_readme_is_short(root):
    lines = (root / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert sum(line.startswith("python3 -m venv .venv-test ") for line in lines) == 1  # .ci/run reads it


def test_extras_that_the_documentation_names_exist(root):
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    named = {extra for page in pages for found in re.findall(r'"(?:\.|top-jax)\[([\w,]+)\]"', page.read_text())
             for extra in found.split(",")}  # fmt: skip
    assert {"train", "dev", "docs"} <= named
    assert named <= set(extras)


def test_python_of_the_documentation_compiles(root):
    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for text in cells(page, "python"):
            compile(text, str(page), "exec")
    for number, text in enumerate(notebook_code(root)):
        compile(text, f"{NOTEBOOK}, cell {number}", "exec")


def test_notebook_is_small(root):
    assert (root / NOTEBOOK).stat().st_size < 100_000


@pytest.mark.slow
def test_shell_cells(root, checkout):
    """Trains fewer steps than the cell does; everything else is as it stands."""
    train, _, quickstart, *_ = cells(root / "README.md", "bash")
    train = train.split(" && ")[-1].strip().removeprefix(".venv/bin/python ")
    assert train == "train.py --config configs/vim_digits_top.py"
    run([sys.executable, *shlex.split(train), "--config.total_steps=8"], checkout)
    printed = ""
    for line in quickstart.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "top-jax"
        printed += run([sys.executable, "-m", "top_jax", *arguments], checkout)
    assert '"images": 360' in printed
    assert len(list((checkout / "pictures").glob("*.png"))) == 2


@pytest.mark.slow
def test_python_cells(root, checkout, tmp_path, monkeypatch):
    """Official weights come from a stand-in for the Hub: a ViM-T with random weights, in the official format."""
    model = top_jax.create_model("vim_tiny", rngs=nnx.Rngs(3))
    file = tmp_path / "vim_t.safetensors"
    top_jax.save_torch_checkpoint(model, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    official = dataclasses.replace(OFFICIAL_FILES["vim_tiny"], file=file.name, sha256=digest)
    monkeypatch.setitem(OFFICIAL_FILES, "vim_tiny", official)
    monkeypatch.chdir(checkout)
    names: dict[str, Any] = {}
    with serving(monkeypatch, tmp_path / "cache", {f"{official.repository}/{file.name}": file.read_bytes()}):
        for number, text in enumerate(cells(root / "README.md", "python")):
            exec(compile(text, f"README.md, cell {number}", "exec"), names)
    assert [cut.kept for cut in names["pruned_model"].schedule] == [167, 142]  # as README says
    assert names["dense"].shape == names["pruned"].shape == (1, 1000)
    expected = jax.jit(lambda model, images: model(images))(model, names["images"])
    np.testing.assert_allclose(names["dense"], expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(names["dense"], names["pruned"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["scan", "pruning"])
def test_guides_that_need_no_files(root, checkout, guide):
    run([sys.executable, "-c", "\n".join(cells(root / "docs" / "guides" / f"{guide}.md", "python"))], checkout)


@pytest.mark.slow
def test_notebook_runs(root, checkout):
    """Trains fewer steps than the notebook does."""
    code = "\n".join(notebook_code(root))
    assert code.count("STEPS = 200") == 1
    printed = run([sys.executable, "-c", code.replace("STEPS = 200", "STEPS = 8")], checkout)
    for name in ("dense", "none, score order", "hold", "decay", "hold, random tokens"):
        assert re.search(rf"^{name} +\d+\.\d% of 360 images$", printed, re.MULTILINE), name
