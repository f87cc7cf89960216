"""Small models, quick to build and compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from small_models import random_model

from top_jax.models import Vim

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, d_state=4, num_classes=5)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Vim]:
    """Builds a small ViM with every parameter moved off its initial value; equal sizes give equal weights."""

    def make(**overrides: Any) -> Vim:
        return random_model("vim_tiny", scale=0.3, **{**SMALL, **overrides})

    return make


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """Like jax.jit, but compiles several times faster, to slower code; these tests mostly compile."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def images() -> jax.Array:
    return jax.device_put(np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32))
