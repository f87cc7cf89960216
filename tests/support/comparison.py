"""How the tests compare numbers; on the import path by pyproject.toml, `pythonpath`."""

from __future__ import annotations

from typing import Any

import numpy as np


def relative_error(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest value wanted; shapes must be equal."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
