"""Small models, quick to build and compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from top_jax.models import Vim, abstract_model

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, d_state=4, num_classes=5)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Vim]:
    """Builds a small ViM with every parameter moved off its initial value; equal sizes give equal weights."""

    def make(**overrides: Any) -> Vim:
        model = abstract_model("vim_tiny", **{**SMALL, **overrides})
        rng = np.random.default_rng(0)
        draw = lambda param: jnp.asarray(rng.normal(size=param.shape) * 0.3, param.dtype)  # noqa: E731
        nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
        return model

    return make


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """Like jax.jit, but compiles several times faster, to slower code; these tests mostly compile."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 16, 16, 3)), jnp.float32)
