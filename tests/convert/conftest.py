from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from top_jax.convert.keys import vim_keys
from top_jax.models import Vim, abstract_model

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, d_state=4, num_classes=3)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    return TINY


@pytest.fixture
def model() -> Vim:
    """Without weights: whatever is not loaded stays a shape."""
    return abstract_model("vim_tiny", **TINY)


@pytest.fixture
def state_dict() -> dict[str, np.ndarray]:
    """An official state_dict of that model, every number its own."""
    from flax import nnx

    shapes = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(abstract_model("vim_tiny", **TINY)))}
    rng = np.random.default_rng(0)
    return {
        key.torch: rng.normal(size=key.layout.to_torch(np.empty(shapes[key.ours])).shape).astype(np.float32)
        for key in vim_keys(TINY["depth"])
    }


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Writes {entry: state_dict or anything} as a .pth file."""

    def save(**entries: Any) -> Path:
        import torch

        def to_torch(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: to_torch(item) for name, item in value.items()}
            return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

        path = tmp_path / "checkpoint.pth"
        torch.save(to_torch(entries), path)
        return path

    return save
