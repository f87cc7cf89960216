"""Inputs and comparisons for every test of the scan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.ops import selective_scan

Inputs = dict[str, Any]


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    def make(batch: int, length: int, width: int, states: int, *, dtype: str = "float32", without=(), seed: int = 0):
        rng = np.random.default_rng((seed, batch, length, width, states))
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
        tokens = {"u": (batch, length, width), "delta": (batch, length, width), "z": (batch, length, width)}
        tokens |= {"B": (batch, length, states), "C": (batch, length, states)}
        inputs = {name: draw(*shape).astype(dtype) for name, shape in tokens.items()}
        inputs |= {"A": -jnp.exp(draw(width, states)), "D": draw(width), "delta_bias": draw(width)}
        return {name: array for name, array in inputs.items() if name not in without}

    return make


@pytest.fixture(scope="session")
def make_positions() -> Callable[..., jax.Array]:
    """Strictly increasing int32 [B, L], with gaps of 0 to 3 that differ per image."""

    def make(batch: int, length: int, seed: int = 0) -> jax.Array:
        steps = np.random.default_rng((seed, batch, length)).integers(1, 5, size=(batch, length))
        return jnp.asarray(np.cumsum(steps, axis=1) - 1, jnp.int32)

    return make


@functools.cache
def _compiled(optimise: bool, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def loss(inputs: Inputs, cotangent: jax.Array, positions: Any):
        out = selective_scan(**inputs, positions=positions, **dict(options))
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    # Unoptimised machine code is made several times faster, and compiling is most of what these tests do.
    fast = None if optimise else {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=fast)


@pytest.fixture(scope="session")
def run_scan() -> Callable[..., tuple[jax.Array, Inputs]]:
    """(output, gradients of sum(output * cotangent) by input), from one program."""

    def run(inputs: Inputs, cotangent: Any = None, *, optimise: bool = False, positions: Any = None, **options: Any):
        if cotangent is None:
            shape = inputs["u"].shape
            cotangent = jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)
        options = {"alignment": "none", "reverse": False, **options}  # so that equal calls share a program
        graded = _compiled(optimise, tuple(sorted(options.items())))
        (_, out), grads = graded(inputs, jnp.asarray(cotangent), positions)
        return out, grads

    return run
