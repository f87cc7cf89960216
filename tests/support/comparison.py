"""Comparison of numbers in the tests; on the import path by pyproject.toml, `pythonpath`."""

from __future__ import annotations

from typing import Any

import numpy as np


def relative_error(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest value wanted; shapes must be equal and `got` finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))
