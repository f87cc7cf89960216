"""Our weights as an official checkpoint, which the authors' PyTorch code loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from top_jax.convert.families import family_of, official_keys
from top_jax.convert.files import write_state_dict
from top_jax.models import Backbone
from top_jax.models.weights import variables_by_path


def save_torch_checkpoint(model: Backbone, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model's weights under their official keys; `load_torch_checkpoint` reads them back, bit for bit.

    Args:
        model: with weights. Its pruning schedule is not part of a checkpoint.
        path: a .pth or .pt file, written by PyTorch with the state_dict in the entry where the family's official code
            has it (`model`, for PlainMamba `state_dict`), or a .safetensors file, written without PyTorch.
        overwrite: replace a file that is there.

    Raises:
        InputError: another suffix, a file that is there already, or one that cannot be written.
    """
    write_state_dict(path, state_dict_of(model), entry=family_of(model.config).entry, overwrite=overwrite)


def state_dict_of(model: Backbone) -> dict[str, np.ndarray]:
    """The official state_dict of a model: float32, counts of batches int64; the inverse of `load_state_dict`."""
    weights = variables_by_path(model)
    result = {}
    for key in official_keys(model.config):
        array = key.layout.to_torch(np.asarray(weights[key.ours].get_value(), np.float32))
        result[key.torch] = np.array(array, order="C")  # a copy, since the writers look past strides
    return result
