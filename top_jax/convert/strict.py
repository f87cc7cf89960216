"""Loads weights strictly, for any kind of model: without wrappers' names, in float32, with all problems at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.convert.inferred_sizes import core, unwrapped
from top_jax.convert.key_maps import LARGEST_COUNT, Key
from top_jax.errors import InputError
from top_jax.models.weights import variables_by_path
from top_jax.values import counted

NAMED: Final = 5  # an error names this many keys of each kind of problem, and counts all


class KeyProblems(NamedTuple):
    """Reasons why a state_dict cannot be loaded.

    Attributes:
        missing: keys of the model that it lacks.
        unexpected: keys that the model lacks.
        misshapen: keys of another shape, with both shapes.
        texts: each kind of problem in words; empty if there is none.
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    texts: list[str]


def without_wrappers(state_dict: Mapping[str, np.ndarray], keys: list[Key]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays under their official names, without the parts that wrappers added, and the changes as text.

    Raises:
        InputError: two arrays would have the same name.
    """
    official = {core(key.torch): key.torch for key in keys}
    result, renamed, sources = {}, [], {}
    for name, array in state_dict.items():
        plain = unwrapped(name)
        new = plain if plain in official.values() else official.get(core(name), plain)
        if new in result:
            raise InputError(
                f"{sources[new]} and {name} are the same weight, {new}, under two names; keep only one of the two sets."
            )
        result[new], sources[new] = array, name
        if new != name:
            renamed.append(f"{name} to {new}")
    return result, [f"{counted(len(renamed), 'key')} renamed, such as {renamed[0]}"] if renamed else []


def as_float32(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts every float array to float32; also returns the changes as text."""
    result, changed = {}, Counter()
    for name, array in state_dict.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float32:
            changed[array.dtype.name] += 1
            array = array.astype(np.float32)
        result[name] = array
    verb = {"float64": "rounded"}
    return result, [
        f"{counted(count, f'{dtype} tensor')} {verb.get(dtype, 'widened')} to float32"
        for dtype, count in changed.items()
    ]


def drop_mmcv_averages(state_dict: dict[str, np.ndarray]) -> list[str]:
    """Removes the buffers of mmcv's EMA hook: `ema_<name, with underscores for dots>` next to each `<name>`.

    The hook swaps the two sets before it saves, so the plain names, which the official code evaluates, hold the
    averages. A buffer without its plain counterpart stays, and is then an unexpected key.
    """
    twins = {f"ema_{name.replace('.', '_')}" for name in state_dict}
    averages = [name for name in state_dict if name in twins]
    for name in averages:
        del state_dict[name]
    return (
        [f"{counted(len(averages), 'buffer')} of mmcv's EMA hook left out, as the official code does"]
        if averages
        else []
    )


def key_problems(
    keys: list[Key], shapes: Mapping[Any, tuple[int, ...]], state_dict: Mapping[str, np.ndarray]
) -> KeyProblems:
    """Compares keys, shapes and dtypes of a state_dict with those of a model.

    Args:
        keys: the model's keys.
        shapes: shapes of the model's weights, by path.
        state_dict: by official name.
    """
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
        elif problem := _unusable(key, array):
            unusable.append(f"{key.torch} {problem}")
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("unusable", unusable))
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds if names]
    return KeyProblems(missing, unexpected, misshapen, problems)


def fill(model: nnx.Module, keys: list[Key], state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's weights, in place, to those of a state_dict that has no `key_problems`."""
    weights = variables_by_path(model)
    for key in keys:
        weight = weights[key.ours]
        weight.set_value(jnp.asarray(key.layout.to_ours(state_dict[key.torch]), weight.dtype))
    nnx.update(model, nnx.from_flat_state({key.ours: weights[key.ours] for key in keys}))


def arrays_of(model: nnx.Module, keys: list[Key]) -> dict[str, np.ndarray]:
    """Returns the weights of a model under their official keys, C-contiguous; the inverse of `fill`."""
    weights = variables_by_path(model)
    result = {}
    for key in keys:
        array = key.layout.to_torch(np.asarray(weights[key.ours].get_value(), np.float32))
        result[key.torch] = np.array(array, order="C")  # a copy, because the writers ignore strides
    return result


def _unusable(key: Key, array: np.ndarray) -> str | None:
    """Returns the problem with the dtype or the values of an array of the right shape, or None."""
    if not key.layout.count:
        return None if array.dtype == np.float32 else f"of type {array.dtype.name} instead of a float"
    if not np.issubdtype(array.dtype, np.integer):
        return f"of type {array.dtype.name} instead of an integer"
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST_COUNT:
        return f"{array} is not in 0 .. 2**24, where a float32 counts exactly"
    return None


def check_finite(state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises InputError, with the names, if an array holds a NaN or an infinity."""
    broken = [name for name, array in state_dict.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"not finite in float32: {counted(len(broken), 'tensor')} ({_some(broken)}); the training that wrote them "
            "diverged, or the file is damaged: take an earlier checkpoint."
        )


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
