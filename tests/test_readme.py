"""README and the notebook: what they tell a user to type runs, in the order in which it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    assert "of 360" in printed or "360 images" in printed
    assert len(list((checkout / "pictures").glob("*.png"))) == 2


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
