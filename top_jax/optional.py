"""Imports of packages that only an extra installs, at their first use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

from top_jax.errors import MissingPackageError

# Import name -> the extra in pyproject.toml that installs it.
EXTRAS: Final = {
    "array_record": "train",
    "datasets": "hf",
    "flatbuffers": "export",
    "grain": "train",
    "huggingface_hub": "hub",
    "jax_triton": "cuda",
    "matplotlib": "figures",
    "ml_collections": "train",
    "rich": "train",
    "safetensors": "convert",
    "scipy": "train",
    "sklearn": "train",
    "tensorboardX": "train",
    "tensorflow_datasets": "train",
    "torch": "convert",
    "triton": "kernels",
    "wandb": "wandb",
}


def optional_package(name: str, *, purpose: str, install: str | None = None) -> Any:
    """Imports a package or module that need not be installed.

    Args:
        name: as in `import name`; a dotted name gives the submodule.
        purpose: what needs it, as the subject of the message, such as `.pth files`.
        install: the argument of `pip install`, such as `'top-jax[convert]'`; by default the extra of `EXTRAS`.

    Raises:
        MissingPackageError: it is not installed, or its installation is broken.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)  # a submodule may be loaded already although its package is blocked
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(package, error, purpose, install) from error


def require(*packages: str, purpose: str) -> None:
    """Checks that packages are installed, without loading them.

    Args:
        *packages: as in `import name`.
        purpose: what needs them, as the subject of the message, such as `training`.

    Raises:
        MissingPackageError: some are missing; the message has one command that installs all their extras.
    """
    lacking = [package for package in packages if not installed(package)]
    if len(lacking) > 1:
        extras = ",".join(dict.fromkeys(EXTRAS[package] for package in lacking))
        problem = f"{purpose} needs the packages {' and '.join(lacking)}: pip install 'top-jax[{extras}]'."
        raise MissingPackageError(problem, name=lacking[0])
    for package in lacking:
        raise _missing(package, ModuleNotFoundError(name=package), purpose, None)


@contextlib.contextmanager
def needs_extras(purpose: str) -> Iterator[None]:
    """Turns a failed import of a package in `EXTRAS` into the message of `optional_package`.

    Args:
        purpose: what needs it, as the subject of the message, such as `training`.

    Raises:
        MissingPackageError: such a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (problem := missing_extra(error, purpose)) is None:
            raise
        raise problem from error


def missing_extra(error: ImportError, purpose: str) -> MissingPackageError | None:
    """Returns the message for a failed import of a package in `EXTRAS`; None for any other import."""
    package = (error.name or "").partition(".")[0]
    if isinstance(error, MissingPackageError) or package not in EXTRAS:
        return None
    return _missing(package, error, purpose, None)


def installed(package: str) -> bool:
    """Returns whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _missing(package: str, error: ImportError, purpose: str, install: str | None) -> MissingPackageError:
    missing = isinstance(error, ModuleNotFoundError) and error.name == package
    problem = f"the package {package}" if missing else f"a working {package} (importing it raised: {error})"
    install = f"'top-jax[{EXTRAS[package]}]'" if install is None else install
    return MissingPackageError(f"{purpose} needs {problem}: pip install {install}.", name=package)
