"""Token reduction in vision state space models, in JAX."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _find_kernels() -> None:
    """Makes `top_jax.kernels` importable in a checkout that is not installed.

    An installation maps the folder `kernels/` into the package (pyproject.toml, `package-dir`): the plain name
    `kernels` belongs to another project on the package index.
    """
    package = Path(__file__).parent
    beside = package.parent / "kernels"
    if (package / "kernels").is_dir() or not (beside / "__init__.py").is_file():
        return
    name = f"{__name__}.kernels"
    spec = importlib.util.spec_from_file_location(
        name, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_find_kernels()
