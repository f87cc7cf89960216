"""Packages that only an extra installs, imported where they are first needed."""

from __future__ import annotations

import importlib
from typing import Any

from top_jax.errors import InputError


def optional_package(name: str, *, purpose: str, install: str) -> Any:
    """Imports a package or module that need not be installed.

    Args:
        name: as in `import name`; a dotted name gives the submodule.
        purpose: what needs it, as the subject of the message: `.pth files`.
        install: what follows `pip install`: `'top-jax[convert]'`.

    Raises:
        InputError: it is not installed, or its installation is broken.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)  # a submodule may be loaded already where its package is blocked
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = f"the package {package}" if missing else f"a working {package} (importing it raised: {error})"
        raise InputError(f"{purpose} needs {problem}: pip install {install}.") from error
