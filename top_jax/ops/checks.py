"""Checks the scan's arguments, for every implementation; each error says what to do."""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from top_jax.errors import InputError
from top_jax.values import refused

DTYPES: Final = ("float32", "bfloat16", "float16")


def check_arrays(names_without: tuple[str, ...], arrays: dict[str, Any]) -> None:
    """Checks that every argument is an array of a dtype in `DTYPES`, or None if it is in `names_without`.

    Raises:
        InputError: an argument is neither; the message names the first.
    """
    for name, array in arrays.items():
        if array is None and name in names_without:
            continue
        if array is None or not is_array(array):
            raise refused(name, array, "a JAX or NumPy array")
        if str(array.dtype) not in DTYPES:
            raise InputError(f"{name} is {array.dtype}; the scan takes {', '.join(DTYPES)}: cast it first.")


def is_array(value: Any) -> bool:
    """Returns whether a value is an array of JAX (traced or not) or NumPy, or a Flax variable that holds one."""
    return isinstance(value, jax.Array | np.ndarray) or (hasattr(value, "__jax_array__") and hasattr(value, "dtype"))


def check_shapes(sizes: dict[str, Any], arrays: dict[str, tuple[Any, str]]) -> None:
    """Checks the shapes of arrays against the sizes of their axes, which are named by letters.

    Args:
        sizes: the size of each letter; an int, or a symbolic dimension of `jax.export`.
        arrays: name -> (array or None, its axes, such as `B L E`); `G?` may also be 1.

    Raises:
        InputError: an array does not fit (the message names the first), or a size is 0.
    """
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        letters = axes.split()
        needed = tuple(sizes[letter.removesuffix("?")] for letter in letters)
        fits = len(array.shape) == len(needed) and all(
            size == need or (letter.endswith("?") and size == 1)
            for size, need, letter in zip(array.shape, needed, letters, strict=True)
        )
        if not fits:
            raise InputError(
                f"{name} has shape {array.shape}; with {_listed(sizes)} it must be {needed}, [{', '.join(letters)}] "
                "(tokens before channels: transpose PyTorch's [B, E, L])."
            )
    if 0 in sizes.values():
        raise InputError(
            f"the arrays have {_listed(sizes)}; the scan needs at least one token, image, channel and state."
        )


def check_reverse(reverse: Any) -> bool:
    """Returns a direction as a bool; raises InputError for any other type."""
    if not isinstance(reverse, bool | np.bool_):
        raise InputError(f"reverse is {reverse!r}; each direction needs True or False, known before jit.")
    return bool(reverse)


def check_positions(positions: Any, shape: tuple[Any, ...], alignment: str) -> None:
    """Checks that positions are int32 of `shape`, or None unless the alignment is `decay`.

    Raises:
        InputError: positions are missing, or have another dtype or shape.
    """
    if positions is None:
        if alignment == "decay":
            raise InputError(
                "alignment='decay' came without positions; it needs the int32 position of each token in the unpruned "
                "sequence: pass positions=..., or alignment='hold'."
            )
        return
    check_places("positions", positions, shape)


def check_places(name: str, places: Any, shape: tuple[Any, ...]) -> None:
    """Raises InputError unless `places` are int32 of `shape`."""
    if not is_array(places) or places.shape != shape or str(places.dtype) != "int32":
        raise refused(name, places, f"int32{list(shape)}, one for each token")


def check_increasing(positions: jax.Array) -> None:
    """Checks that positions increase strictly along the last axis.

    Concrete positions are always checked; traced ones only under `checkify`, never under plain jit. A traced check
    costs every call of a compiled program several milliseconds, even unused, because JAX then dispatches from Python.
    Models omit it, because their positions increase by construction.

    Raises:
        InputError: concrete positions do not increase.
    """
    if isinstance(positions, Tracer):
        increase = positions[..., 1:] > positions[..., :-1]  # comparing, because differences may overflow
        checkify.debug_check(jnp.all(increase), "positions must increase strictly along every image's tokens")
        return
    places = np.asarray(positions)
    increase = places[..., 1:] > places[..., :-1]
    if not increase.all():
        *row, token = (int(index) for index in np.argwhere(~increase)[0])
        start, end = places[(*row, token)], places[(*row, token + 1)]
        raise InputError(
            f"positions of image {row[-1]} go from {start} to {end} at token {token + 1}; they must increase strictly: "
            "sort the kept tokens by position."
        )


def check_permutations(order: jax.Array) -> None:
    """Checks that an order visits each of the L tokens once, because the kernels write to these tokens.

    Traced orders are checked as in `check_increasing`, at the same cost.

    Raises:
        InputError: a concrete order is not a permutation.
    """
    all_tokens = np.arange(order.shape[-1], dtype=np.int32)[None, None, :]
    if isinstance(order, Tracer):
        visited = jnp.sort(order, axis=-1) == all_tokens
        checkify.debug_check(jnp.all(visited), "an order must visit every token of its image once")
        return
    visited = np.sort(np.asarray(order), axis=-1) == all_tokens
    if not visited.all():
        *row, _ = (int(index) for index in np.argwhere(~visited)[0])
        raise InputError(
            f"order of direction {row[0]}, image {row[-1]} does not visit every token once; it needs a permutation of "
            f"0..{order.shape[-1] - 1}, such as jnp.argsort gives."
        )


def _listed(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{letter}={size}" for letter, size in sizes.items())
