"""Refuses what no implementation of the scan could run, with one error that says what to do."""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from top_jax.errors import InputError

ALIGNMENTS: Final = ("none", "hold", "decay")
DTYPES: Final = ("float32", "bfloat16", "float16")


def check_shapes(sizes: dict[str, int], arrays: dict[str, tuple[jax.Array | None, str]]) -> None:
    """Checks shapes against letters and dtypes against `DTYPES`.

    Args:
        sizes: what each letter stands for.
        arrays: name -> (array or None, its axes, such as `B L E`); `G?` may also be 1.

    Raises:
        InputError: the first array that does not fit.
    """
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        needed = tuple(sizes[letter.removesuffix("?")] for letter in axes.split())
        fits = len(array.shape) == len(needed) and all(
            size == need or (letter.endswith("?") and size == 1)
            for size, need, letter in zip(array.shape, needed, axes.split(), strict=True)
        )
        if not fits:
            raise InputError(
                f"{name} has shape {array.shape}; with {_told(sizes)} it must be {needed}, [{', '.join(axes.split())}] "
                "(tokens before channels: transpose PyTorch's [B, E, L])."
            )
        if array.dtype not in DTYPES:
            raise InputError(f"{name} is {array.dtype}; the scan takes {', '.join(DTYPES)}: cast it first.")
    if not sizes["L"]:
        raise InputError(f"u came with {_told(sizes)}: the scan needs at least one token.")


def check_alignment(alignment: str) -> None:
    """Raises InputError unless `alignment` is one of `ALIGNMENTS`."""
    if alignment not in ALIGNMENTS:
        raise InputError(f"alignment={alignment!r} is unknown; choose one of {', '.join(ALIGNMENTS)}.")


def check_positions(positions: jax.Array | None, shape: tuple[int, ...], alignment: str) -> None:
    """Positions must be there for `decay`, and be integers of `shape`.

    Raises:
        InputError: they are not.
    """
    if positions is None:
        if alignment == "decay":
            raise InputError(
                "alignment='decay' came without positions; it needs the int32 place of each token in the unpruned "
                "sequence: pass positions=..., or alignment='hold'."
            )
    elif positions.shape != shape or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(
            f"positions are {positions.dtype}{list(positions.shape)}; needed: int32{list(shape)}, one for each token."
        )


def check_increasing(positions: jax.Array) -> None:
    """Positions must increase strictly along the last axis.

    A traced check costs every call of a compiled program several milliseconds, whether or not anything reads it: JAX
    then dispatches from Python. So models, whose positions increase by construction, leave it out.

    Raises:
        InputError: they do not, seen where they are concrete; under `checkify` when traced; never under plain jit.
    """
    if isinstance(positions, Tracer):
        checkify.debug_check(
            jnp.all(jnp.diff(positions, axis=-1) > 0), "positions must increase strictly along every image's tokens"
        )
        return
    steps = np.diff(np.asarray(positions), axis=-1)
    if (steps <= 0).any():
        *row, token = (int(index) for index in np.argwhere(steps <= 0)[0])
        start, end = positions[(*row, token)], positions[(*row, token + 1)]
        raise InputError(
            f"positions of image {row[-1]} go from {start} to {end} at token {token + 1}; they must increase strictly: "
            "sort the kept tokens by position."
        )


def _told(sizes: dict[str, int]) -> str:
    return ", ".join(f"{letter}={size}" for letter, size in sizes.items())
