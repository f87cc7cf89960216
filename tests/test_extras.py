"""The plain install: what works with nine dependencies, and which extra each command and library call names."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import plain_install
import pytest

from top_jax.optional import EXTRAS

# Import name -> package, where they differ.
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorstore": "orbax-checkpoint",  # its storage
}
OURS = {"top_jax", "configs", "kernels"}


@pytest.fixture(scope="module")
def plain(root, finished_run, tmp_path_factory):
    """What tests/support/plain_install.py finds if no package of an extra can be imported.

    What works and takes seconds is tried in tests/test_packaging.py.
    """
    program = root / "tests" / "support" / "plain_install.py"
    folder = tmp_path_factory.mktemp("plain")
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, program, finished_run, folder, "--block", "--refusals"],
        **{"cwd": folder, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_import_is_light(plain, root):
    assert plain["loaded"] == []
    assert Path(plain["file"]) == root / "top_jax" / "__init__.py"  # of the checkout, which need not be installed


def test_works_or_names_the_extra(plain):
    assert plain_install.unexpected(plain) == {}


def test_doctor_lists_the_missing_extras(plain):
    out = plain["commands"]["doctor"]["out"]
    assert all(f"top-jax[{extra}]" in out for extra in ("train", "figures", "export", "hub", "convert", "hf"))


def test_what_is_imported_is_declared(root):
    """No package is used that comes only because another one needs it."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    plain = {name_of(line) for line in project["dependencies"]}
    extras = {extra: {name_of(line) for line in lines} for extra, lines in project["optional-dependencies"].items()}
    assert len(plain) <= 9
    used = {}
    for folder in ("top_jax", "kernels", "configs"):
        for path in (root / folder).rglob("*.py"):
            used |= dict.fromkeys(third_party(path), path)
    for name, path in used.items():
        package = PACKAGES.get(name, name)
        assert package.replace("_", "-") in plain | extras.get(EXTRAS.get(name, ""), set()), path
    assert {"jax", "flax", "grain", "matplotlib", "tensorboardX"} <= used.keys()
    assert {"tensorflow-datasets", "jax-triton"} <= extras["train"] | extras["cuda"]


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=;,]", requirement)[0].replace("_", "-")


def third_party(path: Path) -> set[str]:
    """Returns the packages that a file imports, by `import` or `optional_package`; neither ours nor Python's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("optional_package", "require"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names)
