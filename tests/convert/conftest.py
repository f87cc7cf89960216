from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import model_of_shapes

from top_jax.models import Backbone

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_classes=3)
# A tiny model of every family. PlainMamba has both kinds of blocks: block 0 ends in a convolution, block 1 does not.
FAMILIES: dict[str, dict[str, Any]] = {
    "vim_tiny": {**TINY, "d_state": 4},
    "plain_mamba_l1": {**TINY, "d_state": 4, "num_convs_patch_embed": 2},
    "deit_tiny": {**TINY, "num_heads": 2},
}


def random_state_dict(model: Backbone) -> dict[str, np.ndarray]:
    """Returns an official state_dict of a model, with different numbers everywhere."""
    from flax import nnx

    from top_jax.convert.key_maps import official_keys
    from top_jax.models.weights import KINDS

    shapes = {path: weight.shape for path, weight in nnx.to_flat_state(nnx.state(model, KINDS))}
    rng = np.random.default_rng(0)
    result = {}
    for key in official_keys(model.config):
        shape = key.layout.torch_shape(shapes[key.ours])
        if key.torch.endswith("num_batches_tracked"):
            result[key.torch] = rng.integers(2**23, 2**24, size=shape, dtype=np.int64)
        else:
            result[key.torch] = rng.normal(size=shape).astype(np.float32)
    return {name: np.asarray(array) for name, array in result.items()}


class FamilyCase:
    """The name and sizes of a model, and an official state_dict of it."""

    def __init__(self, name: str):
        self.name = name
        self.sizes = FAMILIES[name]
        self.state_dict = random_state_dict(self.model())

    def model(self, **changes: Any) -> Backbone:
        """Returns the model without weights: what is not loaded stays a shape."""
        return model_of_shapes(self.name, **{**self.sizes, **changes})


@pytest.fixture(scope="session")
def family_case() -> Callable[[str], FamilyCase]:
    cases: dict[str, FamilyCase] = {}
    return lambda name: cases.setdefault(name, cases.get(name) or FamilyCase(name))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_case: Callable[[str], FamilyCase]) -> FamilyCase:
    return family_case(request.param)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Sizes of the tiny ViM."""
    return FAMILIES["vim_tiny"]


@pytest.fixture
def model(family_case: Callable[[str], FamilyCase]) -> Backbone:
    """The tiny ViM, without weights."""
    return family_case("vim_tiny").model()


@pytest.fixture
def state_dict(family_case: Callable[[str], FamilyCase]) -> dict[str, np.ndarray]:
    """An official state_dict of the tiny ViM, which a test may change."""
    return dict(family_case("vim_tiny").state_dict)


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Returns a function that writes {entry: state_dict or anything} as a .pth file."""

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
