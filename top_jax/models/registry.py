"""The named models: their sizes, and how to build them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final

from flax import nnx

from top_jax.errors import InputError
from top_jax.models.backbone import Backbone, checked_rngs
from top_jax.models.deit import Deit, DeitConfig
from top_jax.models.plain_mamba import PlainMamba, PlainMambaConfig
from top_jax.models.sizes import BackboneConfig, MambaConfig
from top_jax.models.vim import Vim, VimConfig
from top_jax.models.weights import shapes_only
from top_jax.pruning import Reduction
from top_jax.values import height_width, one_of

BACKBONES: Final[dict[type[BackboneConfig], type[Any]]] = {
    VimConfig: Vim,
    PlainMambaConfig: PlainMamba,
    DeitConfig: Deit,
}

MODELS: Final = {
    "vim_tiny": VimConfig(embed_dim=192),
    "vim_small": VimConfig(embed_dim=384),
    "vim_base": VimConfig(embed_dim=768),
    "plain_mamba_l1": PlainMambaConfig(embed_dim=192, layers_with_dwconv=(0,)),
    "plain_mamba_l2": PlainMambaConfig(embed_dim=384, num_convs_patch_embed=2),
    "plain_mamba_l3": PlainMambaConfig(embed_dim=448, depth=36, num_convs_patch_embed=2),
    "deit_tiny": DeitConfig(embed_dim=192, num_heads=3),
    "deit_small": DeitConfig(embed_dim=384, num_heads=6),
    "deit_base": DeitConfig(embed_dim=768, num_heads=12),
}


def model_config(name: str, **overrides: Any) -> BackboneConfig:
    """Returns the sizes of a named model, some of them overridden as in `create_model`.

    Raises:
        InputError: an unknown name or override, or sizes that do not fit together.
    """
    base = MODELS[one_of("model", name, MODELS)]
    check_settings(name, overrides, [field.name for field in dataclasses.fields(base)])
    overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    if "img_size" in overrides:
        overrides["img_size"] = height_width("img_size", overrides["img_size"])
    if isinstance(base, MambaConfig) and overrides.get("stride") is None:  # patches do not overlap by default
        overrides["stride"] = overrides.get("patch_size", base.patch_size)
    return dataclasses.replace(base, **overrides)


def check_settings(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises InputError for an unknown setting; the message lists the known ones."""
    if unknown := sorted(set(given) - set(known)):
        if "pretrained" in unknown:
            raise InputError("pretrained= is only for top_jax.create_model; this one gives random weights.")
        raise InputError(f"{what} has no setting {unknown[0]!r}; it has {', '.join(known)}.")


def create_model(
    name: str, *, rngs: nnx.Rngs | None = None, pruning: Reduction | None = None, **overrides: Any
) -> Backbone:
    """Builds a model with random weights, in eval mode: `top_jax.create_model` without `pretrained`.

    Args:
        name: a key of `MODELS`, such as `vim_small` or `plain_mamba_l1`.
        rngs: source of the initial weights, `nnx.Rngs(0)` by default.
        pruning: how tokens are reduced (`top_jax.pruning`); None is the dense model. It adds no parameters.
        **overrides: any field of the model's config, as for `top_jax.create_model`.

    Raises:
        InputError: an unknown name or override, a value of another type or out of range, or sizes that do not fit
            together.
    """
    config = model_config(name, **overrides)
    model = BACKBONES[type(config)](config, pruning, rngs=checked_rngs(rngs))
    model.eval()
    return model


def abstract_model(name: str, *, pruning: Reduction | None = None, **overrides: Any) -> Backbone:
    """Returns the model with only the shapes of its weights, to be filled from a checkpoint."""
    return shapes_only(lambda rngs: create_model(name, rngs=rngs, pruning=pruning, **overrides))
