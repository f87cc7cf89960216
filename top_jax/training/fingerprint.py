"""A number that changes with any bit of a tree of arrays: what was read back is what was written, or it is known."""

from __future__ import annotations

import zlib
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

PRIME: Final = 2654435761  # Knuth's, 2**32 over the golden ratio: unlike numbers for neighbouring places


def fingerprint(tree: Any) -> int:
    """Of every value and its place; the same however the arrays are split over devices.

    On the devices that hold them, the bits of each number are scrambled together with its place, one to one, and summed
    as integers modulo 2**32, so that the order of the sum cannot matter. Arrays hold numbers of 32 bits or fewer.

    Args:
        tree: of arrays; in several processes all must call it.

    Returns:
        0 .. 2**32 - 1.
    """
    sums = jax.device_get([_sum_of_scrambled(leaf) for leaf in jax.tree.leaves(tree)])
    return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


@jax.jit
def _sum_of_scrambled(array: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # by axis, because flattening would gather an array that is split
        along = jnp.arange(size, dtype=jnp.uint32).reshape((size,) + (1,) * (bits.ndim - axis - 1))
        place = (place + along) * jnp.uint32(PRIME)
    return jnp.sum(_scrambled(bits ^ _scrambled(place)), dtype=jnp.uint32)


def _scrambled(x: jax.Array) -> jax.Array:
    """One to one on uint32. Source: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
