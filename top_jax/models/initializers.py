"""Initial values of the official models; PyTorch's defaults where these set none."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]


# timm 0.4.12's lecun_normal_ divides by the deviation of a normal truncated at 2 sigma, but then truncates at 2.
patch_embed: Initializer = jax.nn.initializers.variance_scaling(
    0.87962566103423978**-2, "fan_in", "normal", dtype=jnp.float32
)


# timm's and mmcls's trunc_normal_: deviation 0.02, truncated at 2, so in effect not truncated.
trunc_normal: Initializer = jax.nn.initializers.normal(0.02, jnp.float32)


# mmcv's kaiming_init, of the convolutions of mmseg's heads.
kaiming_normal_fan_out: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal", dtype=jnp.float32)


def uniform(bound: float) -> Initializer:
    """Returns an initializer that draws from U(-bound, bound)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draws torch.nn.Linear's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for a kernel `[in, out]`."""
    return uniform(shape[0] ** -0.5)(key, shape, dtype)


def uniform_fan_in_conv(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draws torch.nn.Conv2d's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for a kernel `[h, w, in, out]`."""
    return uniform(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)


def residual_out(depth: int) -> Initializer:
    """Returns `uniform_fan_in` divided by sqrt(depth), for the projection into the residual stream (GPT-2's rule)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return uniform_fan_in(key, shape, dtype) / math.sqrt(depth)

    return initialize


def dt_bias(
    key: jax.Array, shape: tuple[int, ...], smallest: float = 1e-3, largest: float = 1e-1, floor: float = 1e-4
) -> jax.Array:
    """Draws a bias whose softplus is log-uniform in [smallest, largest] and at least `floor`.

    Source: hustvl/Vim, mamba-1p1p1/mamba_ssm/modules/mamba_simple.py.
    """
    log_dt = jax.random.uniform(key, shape, jnp.float32, math.log(smallest), math.log(largest))
    dt = jnp.maximum(jnp.exp(log_dt), floor)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


def a_log(inner_dim: int, d_state: int) -> jax.Array:
    """Returns log(1..N) for every channel (S4D-real), float32 `[E, N]`."""
    return jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=jnp.float32))[None, :], (inner_dim, 1))
