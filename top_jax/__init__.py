"""Token reduction in vision state space models, in JAX.

    model = top_jax.create_model("vim_small", pruning=top_jax.Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8))
    logits = model(images)

Names are imported at their first use, so that operations and models need nothing but JAX, Flax and einops.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from top_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from top_jax import models, ops, pruning
    from top_jax.convert import (
        load_torch_checkpoint,
        load_torch_segmenter,
        save_torch_checkpoint,
        save_torch_segmenter,
    )
    from top_jax.data import preprocess
    from top_jax.inference import predict, segment
    from top_jax.models import create_segmenter
    from top_jax.pruning import Evit, Merging, Pruning
    from top_jax.training import load_checkpoint
    from top_jax.zoo import create_model, data_config, list_models

__all__ = [
    "Evit",
    "Merging",
    "Pruning",
    "create_model",
    "create_segmenter",
    "data_config",
    "list_models",
    "load_checkpoint",
    "load_torch_checkpoint",
    "load_torch_segmenter",
    "models",
    "ops",
    "predict",
    "preprocess",
    "pruning",
    "save_torch_checkpoint",
    "save_torch_segmenter",
    "segment",
]

_HOMES = {
    "Evit": "top_jax.pruning",
    "Merging": "top_jax.pruning",
    "Pruning": "top_jax.pruning",
    "create_model": "top_jax.zoo",
    "create_segmenter": "top_jax.models",
    "data_config": "top_jax.zoo",
    "list_models": "top_jax.zoo",
    "load_checkpoint": "top_jax.training",
    "load_torch_checkpoint": "top_jax.convert",
    "load_torch_segmenter": "top_jax.convert",
    "predict": "top_jax.inference",
    "preprocess": "top_jax.data",
    "save_torch_checkpoint": "top_jax.convert",
    "save_torch_segmenter": "top_jax.convert",
    "segment": "top_jax.inference",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_kernels() -> None:
    """Reports a checkout whose link `top_jax/kernels -> ../kernels` is missing or was written out as a text file.

    The plain name `kernels` belongs to another project on the package index: an installation maps the folder into the
    package (pyproject.toml, `package-dir`), and a checkout has the link.
    """
    if importlib.util.find_spec(f"{__name__}.kernels") is None:
        raise ImportError(
            "top_jax.kernels is missing: this checkout has no link top_jax/kernels -> ../kernels (git needs "
            "core.symlinks=true to make it). Install the package instead: pip install -e ."
        )


_check_kernels()
