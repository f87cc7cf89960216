"""Official weights into our models, strictly: nothing missing, nothing left over."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.convert.families import family_of, official_keys
from top_jax.convert.files import read_state_dict
from top_jax.convert.hints import hint
from top_jax.convert.keys import LARGEST_COUNT, Key
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.convert.report import KeyReport, key_report
from top_jax.errors import InputError
from top_jax.models import Backbone, abstract_model, model_config
from top_jax.models.layers import height_width
from top_jax.models.weights import variables_by_path
from top_jax.pruning import Reduction

NAMED: Final = 5  # keys that an error names of each kind of problem; it counts all


def load_torch_checkpoint(
    path: str | Path,
    name: str,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds the named model with the weights of an official file, in eval mode.

    Args:
        path: a .pth file (read by PyTorch), or a .safetensors file of the same keys (read without it).
        name: a model name, as for `create_model`.
        pruning: a schedule for the model; weights do not depend on it.
        ema: take the averaged weights, `model_ema` of a .pth file.
        checkpoint_img_size: image size that the file was trained at, needed only where its position embedding must be
            resized from a grid that is not square.
        **overrides: as for `create_model`. With another `img_size` the position embedding is resized (bicubic).

    Raises:
        InputError: an unreadable file, or keys that are missing, unexpected or misshapen, each named.
    """
    return load_with_report(path, name, pruning, ema, checkpoint_img_size=checkpoint_img_size, **overrides)[0]


def load_with_report(
    path: str | Path,
    name: str,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[Backbone, KeyReport]:
    """As `load_torch_checkpoint`, with an account of every key."""
    model_config(name, **overrides)  # raises before a large file is read
    state_dict = read_state_dict(path, ema=ema)
    model = abstract_model(name, pruning=pruning, **overrides)  # every weight is about to come from the file
    try:
        changes = load_state_dict(model, state_dict, checkpoint_img_size=checkpoint_img_size)
    except InputError as error:
        raise InputError(f"{path} does not fit {name}: {error}") from None
    return model, key_report(model, changes)


def load_state_dict(
    model: Backbone, state_dict: Mapping[str, np.ndarray], *, checkpoint_img_size: int | tuple[int, int] | None = None
) -> tuple[str, ...]:
    """Puts an official state_dict (numpy arrays) into `model`, in place and strictly; see `load_torch_checkpoint`.

    Returns:
        What was changed on the way beside the order of axes, in words.
    """
    keys = official_keys(model.config)
    weights = variables_by_path(model)
    state_dict, changes = _as_float32(state_dict)
    changes += _drop_mmcv_averages(state_dict)
    if state_dict.keys() == {key.torch for key in keys}:  # else the model is another, and its grid may be too
        changes += _fit_position_embedding(model, state_dict, checkpoint_img_size)
    _check_keys(model, keys, {path: weight.shape for path, weight in weights.items()}, state_dict)
    _check_finite(state_dict)
    for key in keys:
        weight = weights[key.ours]
        weight.set_value(jnp.asarray(key.layout.to_ours(state_dict[key.torch]), weight.dtype))
    nnx.update(model, nnx.from_flat_state(weights))
    return tuple(changes)


def _as_float32(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Every array of floats in float32, and what that changed in words."""
    result, changed = {}, Counter()
    for name, array in state_dict.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float32:
            changed[array.dtype.name] += 1
            array = array.astype(np.float32)
        result[name] = array
    verb = {"float64": "rounded"}
    return result, [
        f"{count} {dtype} tensors {verb.get(dtype, 'widened')} to float32" for dtype, count in changed.items()
    ]


def _check_finite(state_dict: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in state_dict.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"{len(broken)} tensors are not finite in float32 ({_some(broken)}); the training that wrote them "
            "diverged, or the file is damaged: take an earlier checkpoint."
        )


def _drop_mmcv_averages(state_dict: dict[str, np.ndarray]) -> list[str]:
    """Takes the buffers of mmcv's EMA hook out: `ema_<name, dots as underscores>` beside each `<name>`.

    The hook swaps the two sets before it saves, so that the plain names, which the official code evaluates, hold the
    averages. A buffer without its twin stays, and is an unexpected key.
    """
    twins = {f"ema_{name.replace('.', '_')}" for name in state_dict}
    averages = [name for name in state_dict if name in twins]
    for name in averages:
        del state_dict[name]
    return [f"{len(averages)} buffers of mmcv's EMA hook left out, as the official code does"] if averages else []


def _check_keys(
    model: Backbone, keys: list[Key], shapes: dict[Any, tuple[int, ...]], state_dict: Mapping[str, np.ndarray]
) -> None:
    unmapped = set(shapes) ^ {key.ours for key in keys}
    assert not unmapped, f"parameters without an official key, or the reverse: {unmapped}"

    known = {key.torch for key in keys}
    missing = [key.torch for key in keys if key.torch not in state_dict]
    unexpected = sorted(set(state_dict) - known)
    misshapen, unusable = [], []
    for key in keys:
        array = state_dict.get(key.torch)
        if array is None:
            continue
        needed = key.layout.torch_shape(shapes[key.ours])
        if array.shape != needed:
            misshapen.append(f"{key.torch} {array.shape} instead of {needed}")
        elif complaint := _unusable(key, array):
            unusable.append(f"{key.torch} {complaint}")
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("unusable", unusable))
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds if names]
    if problems:
        raise InputError(f"{'; '.join(problems)}. {hint(model.config, state_dict.keys())}")


def _unusable(key: Key, array: np.ndarray) -> str | None:
    """What is wrong with the numbers of an array whose shape is right."""
    if not key.layout.count:
        return None if array.dtype == np.float32 else f"of type {array.dtype.name} instead of a float"
    if not np.issubdtype(array.dtype, np.integer):
        return f"of type {array.dtype.name} instead of an integer"
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST_COUNT:
        return f"{array} is not in 0 .. 2**24, where a float32 counts exactly"
    return None


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _fit_position_embedding(
    model: Backbone, state_dict: dict[str, np.ndarray], checkpoint_img_size: int | tuple[int, int] | None
) -> list[str]:
    """Resizes the position embedding, in place, where its number of tokens is not the model's; says so in words."""
    config, family = model.config, family_of(model.config)
    name = family.position_embedding
    embedding = state_dict[name]
    if embedding.ndim != 3 or (embedding.shape[0], embedding.shape[2]) != (1, config.embed_dim):
        return []
    num_patches = embedding.shape[1] - (config.CLASS_TOKEN is not None)
    if checkpoint_img_size is not None:
        source = dataclasses.replace(config, img_size=height_width(checkpoint_img_size)).grid
    elif num_patches in (config.num_patches, 0):
        return []
    else:
        source = height_width(math.isqrt(num_patches))
    if source[0] * source[1] != num_patches:
        raise InputError(
            f"{name} has {num_patches} patch tokens, which is no {source[0]} x {source[1]} grid; pass "
            "checkpoint_img_size=(height, width), the size the checkpoint was trained at."
        )
    if source == config.grid:
        return []
    state_dict[name] = resize_position_embedding(embedding, source, config.grid, class_token=config.CLASS_TOKEN)
    (rows, columns), (new_rows, new_columns) = source, config.grid
    return [f"{name} resized from {rows} x {columns} to {new_rows} x {new_columns} patches (bicubic)"]
