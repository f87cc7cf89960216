"""`kernels/` is importable as top_jax.kernels from a checkout, an editable install, a wheel, an sdist and a zip."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import plain_install
import pytest

PROGRAM = """
import jax.numpy as jnp
import top_jax, top_jax.kernels.blocks, top_jax.ops
ones = jnp.ones((1, 3, 2))
top_jax.ops.selective_scan(ones, ones, -jnp.ones((2, 2)), ones, ones, implementation="xla").block_until_ready()
print(top_jax.__file__)
print(top_jax.kernels.blocks.__file__)
"""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def settings(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_every_package_is_listed(root):
    folders = {path.parent for path in (root / "top_jax").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(root).parts) for folder in folders}
    packages |= {"top_jax.configs", "top_jax.kernels"}  # through links
    assert len(packages) > 5
    assert set(settings(root)["tool"]["setuptools"]["packages"]) == packages


def test_version_is_one(root):
    import top_jax

    assert settings(root)["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "top_jax.version.__version__"}
    assert top_jax.__version__.count(".") == 2


def test_public_names_load():
    import top_jax

    for name in top_jax.__all__:
        assert getattr(top_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'top_jax' has no attribute 'modles'"):
        top_jax.modles  # noqa: B018


@pytest.mark.slow  # quick as test_extras.py, without a scan
def test_from_an_uninstalled_checkout(root, tmp_path):
    package, kernel = run([sys.executable, "-c", PROGRAM], tmp_path, PYTHONPATH=str(root)).split()
    assert Path(package) == root / "top_jax" / "__init__.py"
    assert Path(kernel).resolve() == root / "kernels" / "blocks.py"


@pytest.fixture
def checkout(root, tmp_path) -> Path:
    """A copy to build from, so that no build folder is left in the real one; its link is a link too."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("top_jax", "configs", "kernels"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert (copy / "top_jax" / "kernels").is_symlink()
    return copy


@pytest.fixture(params=["text file", "nothing"])
def checkout_without_link(request, checkout) -> Path:
    """The copy as git writes it on a system without links, or as a zip download may unpack there."""
    link = checkout / "top_jax" / "kernels"
    link.unlink()
    if request.param == "text file":
        link.write_text("../kernels")
    return checkout


def test_a_checkout_without_links_is_one_clear_line(checkout_without_link, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(checkout_without_link)}
    done = subprocess.run(  # -S: without site-packages, where an editable installation would find the kernels
        [sys.executable, "-S", "-c", "import top_jax"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: top_jax.kernels is missing") and "pip install -e ." in last


@pytest.fixture
def environment(tmp_path) -> tuple[Path, Path]:
    """(python, site-packages) of a virtual environment that sees this one's packages, but not an installed top_jax."""
    folder = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", folder], tmp_path)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site


def install(python: Path, what: list[str | Path], cwd: Path) -> None:
    try:
        isolated = int(importlib.metadata.version("setuptools").split(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        isolated = True
    how = [] if isolated else ["--no-build-isolation"]  # isolation downloads setuptools
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--force-reinstall", *how]
    run([*pip, *what], cwd)


def check_installed(python: Path, site: Path, cwd: Path) -> None:
    """The package runs from site-packages, with its data files and without a top-level `kernels`."""
    package, kernel = run([python, "-c", PROGRAM], cwd).split()
    assert Path(package) == site / "top_jax" / "__init__.py"
    assert Path(kernel) == site / "top_jax" / "kernels" / "blocks.py"
    assert (site / "top_jax" / "py.typed").exists()
    assert (site / "top_jax" / "kernels" / "tuning" / "some-gpu.json").exists()
    assert not (site / "kernels").exists()


@pytest.mark.slow
def test_from_a_wheel(checkout, environment, finished_run, tmp_path):
    python, site = environment
    (checkout / "kernels" / "tuning" / "some-gpu.json").write_text("{}")
    install(python, [checkout], tmp_path)
    shutil.rmtree(checkout)
    check_installed(python, site, tmp_path)
    assert "3.59" in run([python, "-m", "top_jax", "flops", "--config=vim_s_top"], tmp_path)  # a config by its name
    (tmp_path / "plain").mkdir()
    program = [python, plain_install.__file__, finished_run, tmp_path / "plain", "--block"]
    results = json.loads(run(program, tmp_path))
    assert Path(results["file"]) == site / "top_jax" / "__init__.py"
    assert plain_install.unexpected(results) == {}


@pytest.mark.slow
def test_from_a_tree_without_links(checkout_without_link, environment, tmp_path):
    python, site = environment
    (checkout_without_link / "kernels" / "tuning" / "some-gpu.json").write_text("{}")
    install(python, [checkout_without_link], tmp_path)
    check_installed(python, site, tmp_path)


@pytest.mark.slow
def test_from_an_sdist(checkout, environment, tmp_path):
    python, site = environment
    pytest.importorskip("build", reason="needs the package `build` (the `dev` extra)")
    (checkout / "kernels" / "tuning" / "some-gpu.json").write_text("{}")
    run([sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, checkout], tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    install(python, [archive], tmp_path)
    check_installed(python, site, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("linked", [True, False])
def test_from_an_editable_install(checkout, environment, tmp_path, linked):
    python, _ = environment
    if not linked:
        (checkout / "top_jax" / "kernels").unlink()
        (checkout / "top_jax" / "kernels").write_text("../kernels")
    install(python, ["-e", checkout], tmp_path)
    package, kernel = run([python, "-c", PROGRAM], tmp_path).split()
    assert Path(package) == checkout / "top_jax" / "__init__.py"
    assert Path(kernel).resolve() == checkout / "kernels" / "blocks.py"
