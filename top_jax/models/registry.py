"""Names of models: the sizes behind each, and the one way to build them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from flax import nnx

from top_jax.errors import InputError
from top_jax.models.layers import height_width
from top_jax.models.vim import Vim, VimConfig
from top_jax.pruning import Pruning

MODELS: Final = {
    "vim_tiny": VimConfig(embed_dim=192),
    "vim_small": VimConfig(embed_dim=384),
    "vim_base": VimConfig(embed_dim=768),
}


def model_config(name: str, **overrides: Any) -> VimConfig:
    """The named model's sizes with some overridden; overrides as for `create_model`.

    Raises:
        InputError: an unknown name or override, or sizes that do not fit together.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}.")
    base = MODELS[name]
    known = [field.name for field in dataclasses.fields(base)]
    if unknown := sorted(set(overrides) - set(known)):
        raise InputError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    if "img_size" in overrides:
        overrides["img_size"] = height_width(overrides["img_size"])
    if overrides.get("stride") is None:  # the stride follows the patch unless it is given
        overrides["stride"] = overrides.get("patch_size", base.patch_size)
    return dataclasses.replace(base, **overrides)


def create_model(name: str, *, rngs: nnx.Rngs | None = None, pruning: Pruning | None = None, **overrides: Any) -> Vim:
    """Builds a model with random weights, in eval mode (`.train()` switches drop-path on).

    Args:
        name: `vim_tiny`, `vim_small` or `vim_base`.
        rngs: source of the initial weights; `nnx.Rngs(0)` if not given.
        pruning: a schedule; None is the dense model. It adds no parameters.
        **overrides: any field of the model's config (`top_jax.models.VimConfig`): `num_classes`, `img_size` (a side, or
            (height, width)), `patch_size`, `stride` (the patch's, if not given), `embed_dim`, `depth`, `d_state`,
            `drop_path`, `dtype`, `implementation`, `remat`...

    Raises:
        InputError: an unknown name or override, or sizes that do not fit together.
    """
    model = Vim(model_config(name, **overrides), pruning, rngs=rngs or nnx.Rngs(0))
    model.eval()
    return model


def abstract_model(name: str, *, pruning: Pruning | None = None, **overrides: Any) -> Vim:
    """The model without weights, only their shapes: to be filled from a checkpoint at no cost."""
    return nnx.eval_shape(lambda: create_model(name, pruning=pruning, **overrides))
