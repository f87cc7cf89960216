"""The dense model that a run learns from, kept by the run so that it is the same at every start."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from top_jax.build import build_abstract_model
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.models.weights import Weights
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import has_weights, restore_weights, save_weights
from top_jax.training.weights import checkpoint_weights

Teacher = tuple[nnx.GraphDef[Any], Weights]
"""The model and its weights."""

WHICH = "teacher"  # its place among the run's checkpoints


def load_teacher(run: RunDirectory, config: RunConfig) -> Weights | None:
    """The teacher's weights from `distillation.teacher`, for a run that does not keep them yet.

    To be called before the directory is claimed: the source may be bad input, and then nothing is to be written.

    Returns:
        None where the run keeps them already (the source may be gone), or has no teacher.

    Raises:
        InputError: nothing there, or weights of another model or class count.
    """
    if config.distillation.teacher is None or has_weights(run, WHICH):
        return None
    try:
        return checkpoint_weights(config.distillation.teacher, config.model)
    except InputError as error:
        raise InputError(f"config.distillation.teacher, the dense model of the run's own size: {error}") from error


def read_teacher(run: RunDirectory, config: RunConfig, loaded: Weights | None = None) -> Teacher:
    """The teacher: the model of the run, dense, and the weights that the run keeps for it.

    To be called once the directory is this run's own, which makes sure that the weights kept there are those that its
    config names.

    Args:
        run: the run directory.
        config: of the run, with a teacher.
        loaded: from `load_teacher`; kept now in checkpoints/teacher, weights only, if not None.

    Returns:
        The graphdef, for `make_train_step`, and the weights as restored, on the default device.
    """
    if loaded is not None:
        # NumPy arrays, because of several processes, which all have them, one has to write.
        save_weights(run, jax.tree.map(np.asarray, loaded), which=(WHICH,))
    graphdef = nnx.graphdef(build_abstract_model(config.model))
    return graphdef, restore_weights(run, WHICH, config.model)
