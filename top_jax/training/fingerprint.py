"""A number that changes with any bit of a tree of arrays: what was read back is what was written, or it is known."""

from __future__ import annotations

import zlib
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

# Odd, so that multiplying by it loses no bit; large, so that neighbours get unlike weights.
SPREAD: Final = 2654435761


def fingerprint(tree: Any) -> int:
    """Of every value and its place; the same however the arrays are split over devices.

    Each array is summed on its devices, bits as integers modulo 2**32 and weighted by their place, so that the order of
    the sum cannot matter. Arrays hold numbers of 32 bits or fewer.

    Args:
        tree: of arrays; in several processes all must call it.

    Returns:
        0 .. 2**32 - 1.
    """
    sums = jax.device_get([_weighted_sum(leaf) for leaf in jax.tree.leaves(tree)])
    return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


@jax.jit
def _weighted_sum(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize == 4:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        array = jax.lax.bitcast_convert_type(array, unsigned)
    bits = array.astype(jnp.uint32)
    weights = jnp.ones(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # by axis, because flattening would gather an array that is split
        place = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(SPREAD) + jnp.uint32(axis)
        shape = (1,) * axis + (size,) + (1,) * (bits.ndim - axis - 1)
        weights = weights * (2 * place + 1).reshape(shape)
    return jnp.sum(bits * weights, dtype=jnp.uint32)
