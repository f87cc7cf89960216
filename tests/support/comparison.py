"""Comparison of numbers in the tests; on the import path by pyproject.toml, `pythonpath`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def relative_error(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest value wanted; shapes must be equal and `got` finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def in_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whose results are NumPy arrays: looking at a row of JAX's would compile one more program."""
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *arguments, **named: jax.tree.map(np.asarray, compiled(*arguments, **named))
