"""Official weights into our models, strictly: nothing missing, nothing left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.convert.keys import Key
from top_jax.convert.plain_mamba import plain_mamba_keys
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.convert.torch_file import read_state_dict
from top_jax.convert.vim import vim_keys
from top_jax.errors import InputError
from top_jax.models import Backbone, ModelSizes, PlainMambaConfig, VimConfig, abstract_model
from top_jax.models.layers import height_width, patch_grid
from top_jax.models.weights import KINDS
from top_jax.pruning import Reduction

KEYS: Final[dict[type, Callable[[Any], list[Key]]]] = {VimConfig: vim_keys, PlainMambaConfig: plain_mamba_keys}


def official_keys(config: ModelSizes) -> list[Key]:
    """Every parameter and buffer of an official checkpoint of this size, with its place in our model."""
    return KEYS[type(config)](config)


def load_torch_checkpoint(
    path: str | Path,
    name: str,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds the named model with the weights of an official .pth file, in eval mode.

    Args:
        path: the file.
        name: a model name, as for `create_model`.
        pruning: a schedule for the model; weights do not depend on it.
        ema: take the file's `model_ema`.
        checkpoint_img_size: image size that the file was trained at, needed only where its position embedding must be
            resized from a grid that is not square.
        **overrides: as for `create_model`. With another `img_size` the position embedding is resized (bicubic).

    Raises:
        InputError: an unreadable file, or keys that are missing, unexpected or misshapen, each named.
    """
    state_dict = read_state_dict(path, ema=ema)
    model = abstract_model(name, pruning=pruning, **overrides)  # every weight is about to come from the file
    try:
        load_state_dict(model, state_dict, checkpoint_img_size=checkpoint_img_size)
    except InputError as error:
        raise InputError(f"{path} does not fit {name}: {error}") from None
    return model


def load_state_dict(
    model: Backbone, state_dict: Mapping[str, np.ndarray], *, checkpoint_img_size: int | tuple[int, int] | None = None
) -> None:
    """Puts an official state_dict (numpy arrays) into `model`, in place and strictly; see `load_torch_checkpoint`."""
    keys = official_keys(model.config)
    params = dict(nnx.to_flat_state(nnx.state(model, KINDS)))
    state_dict = _fit_position_embedding(model, dict(state_dict), checkpoint_img_size)
    _check_keys(keys, {path: param.shape for path, param in params.items()}, state_dict)
    for key in keys:
        weight = params[key.ours]
        weight.set_value(jnp.asarray(key.layout.to_ours(state_dict[key.torch]), weight.dtype))
    nnx.update(model, nnx.from_flat_state(params))


def _check_keys(keys: list[Key], shapes: dict[Any, tuple[int, ...]], state_dict: Mapping[str, np.ndarray]) -> None:
    unmapped = set(shapes) ^ {key.ours for key in keys}
    assert not unmapped, f"parameters without an official key, or the reverse: {unmapped}"

    known = {key.torch for key in keys}
    missing = [key.torch for key in keys if key.torch not in state_dict]
    unexpected = sorted(set(state_dict) - known)
    misshapen = []
    for key in keys:
        if key.torch in state_dict:
            needed = key.layout.to_torch(np.empty(shapes[key.ours], np.bool_)).shape
            if state_dict[key.torch].shape != needed:
                misshapen.append(f"{key.torch} {state_dict[key.torch].shape} instead of {needed}")
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise InputError(
            f"{'; '.join(problems)}. Choose the model and the overrides that the checkpoint was trained with."
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _fit_position_embedding(
    model: Backbone, state_dict: dict[str, np.ndarray], checkpoint_img_size: int | tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Resizes `pos_embed` where its number of tokens is not the model's."""
    config, embedding = model.config, state_dict.get("pos_embed")
    if embedding is None or embedding.ndim != 3:
        return state_dict
    num_patches = embedding.shape[1] - 1
    if checkpoint_img_size is not None:
        source = patch_grid(height_width(checkpoint_img_size), config.patch_size, config.stride)
    elif num_patches == config.num_patches:
        return state_dict
    else:
        source = height_width(math.isqrt(num_patches))
    if source[0] * source[1] != num_patches:
        raise InputError(
            f"pos_embed has {num_patches} patch tokens, which is no {source[0]} x {source[1]} grid; pass "
            "checkpoint_img_size=(height, width), the size the checkpoint was trained at."
        )
    resized = resize_position_embedding(embedding, source, config.grid, class_token=True)
    return {**state_dict, "pos_embed": resized}
