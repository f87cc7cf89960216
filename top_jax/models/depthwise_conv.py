"""Depthwise 2D convolution, of maps and of the tokens that are left; fast on a CPU too, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from top_jax.models.traversals import Traversals, from_cells, to_cells
from top_jax.typing import Array, Float

Grid = Float[Array, "B H W E"]
Taps = Float[Array, "taps taps E"]


def convolve_tokens(x: Float[Array, "B L E"], kernel: Taps, paths: Traversals) -> Float[Array, "B L E"]:
    """Convolves tokens, all or those that are left, on their grid: scatter (zeros in empty cells), convolve, gather."""
    return from_cells(depthwise_conv2d(to_cells(x, paths), kernel), paths)


def depthwise_conv2d(x: Grid, kernel: Taps) -> Grid:
    """Cross-correlates each channel with its own odd-sided kernel; the border is padded with zeros.

    Args:
        x: `[B, H, W, E]`.
        kernel: `[taps, taps, E]`, in the dtype of x.

    Returns:
        `[B, H, W, E]`. A CPU runs shifted products with their own gradient, because XLA's grouped convolution is many
        times slower there (docs/concepts/models.md has the table); other devices run the grouped convolution.

    Source: torch.nn.Conv2d(E, E, taps, padding=taps // 2, groups=E, bias=False).
    """
    return jax.lax.platform_dependent(x, kernel, cpu=shifted_conv2d, default=grouped_conv2d)


def grouped_conv2d(x: Grid, kernel: Taps) -> Grid:
    """Computes `depthwise_conv2d` by XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def shifted_conv2d(x: Grid, kernel: Taps) -> Grid:
    """Computes `depthwise_conv2d` as a float32 sum of shifted products."""
    height, width, taps = x.shape[1], x.shape[2], kernel.shape[0]
    padded, weights = _pad(x, taps).astype(jnp.float32), kernel.astype(jnp.float32)
    products = (
        padded[:, i : i + height, j : j + width] * weights[i, j][None, None, None, :]
        for i in range(taps)
        for j in range(taps)
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _shifted_forward(x: Grid, kernel: Taps) -> tuple[Grid, tuple[Grid, Taps]]:
    return shifted_conv2d(x, kernel), (x, kernel)


def _shifted_backward(saved: tuple[Grid, Taps], dy: Grid) -> tuple[Grid, Taps]:
    """Computes dx by a convolution with the flipped kernel, and dkernel by a loop over taps, which compiles once."""
    x, kernel = saved
    taps = kernel.shape[0]
    padded, zero = _pad(x, taps), jnp.int32(0)  # a plain 0 is int64 where JAX runs in 64 bits

    def tap(place: Array) -> Array:
        window = jax.lax.dynamic_slice(padded, (zero, place // taps, place % taps, zero), x.shape)
        return jnp.sum(window.astype(jnp.float32) * dy.astype(jnp.float32), axis=(0, 1, 2))

    dkernel = jax.lax.map(tap, jnp.arange(taps * taps, dtype=jnp.int32)).reshape(kernel.shape)
    return shifted_conv2d(dy, kernel[::-1, ::-1]), dkernel.astype(kernel.dtype)


shifted_conv2d.defvjp(_shifted_forward, _shifted_backward)


def _pad(x: Grid, taps: int) -> Float[Array, "B rows columns E"]:
    side = (taps // 2, taps // 2)
    return jnp.pad(x, ((0, 0), side, side, (0, 0)))
