"""Weights for a model from wherever they are: a run directory, an official file, or a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from top_jax.build import build_model
from top_jax.config import ModelConfig, RunConfig
from top_jax.convert import load_torch_checkpoint
from top_jax.errors import InputError
from top_jax.models.weights import Weights, weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import abstract_weights, read_weights


def initial_weights(config: RunConfig) -> Weights:
    """The run's first weights: those of `init_from`, or random ones from its seed.

    Pruning adds no parameters, so the dense model's weights fit the pruned one.
    """
    if config.init_from is not None:
        return checkpoint_weights(config.init_from, config.model)
    return weights_of(build_model(config.model, rngs=nnx.Rngs(config.seed)))


def checkpoint_weights(
    checkpoint: str | Path, config: ModelConfig, *, which: str = "best", ema: bool | None = None
) -> Weights:
    """Weights for the model of `config`.

    Args:
        checkpoint: a run directory, or an official .pth or .safetensors file.
        config: the model they must fit.
        which: `best` or `latest`, of a run directory.
        ema: averaged weights; None takes them where a run kept them, and not from a file.

    Raises:
        InputError: nothing there, or weights of another model or class count.
    """
    path = Path(checkpoint)
    if path.is_dir():
        run = RunDirectory(path)
        _check_same_model(run, config)
        return read_weights(run, which, ema)
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist; pass a run directory or an official .pth or .safetensors file."
        )
    return weights_of(load_torch_checkpoint(path, config.name, ema=bool(ema), **config.overrides()))


def _check_same_model(run: RunDirectory, config: ModelConfig) -> None:
    trained = run.read_config().model
    if trained.num_classes != config.num_classes:
        raise InputError(
            f"checkpoint {run.path} is of a model with {trained.num_classes} classes, and this one has "
            f"{config.num_classes}; use data of as many classes, or another checkpoint."
        )
    there, here = _shapes(trained), _shapes(config)
    different = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if different:
        name = different[0]
        raise InputError(
            f"checkpoint {run.path} is of another model: {len(different)} weights differ, such as {name} "
            f"({there.get(name, 'absent')} there, {here.get(name, 'absent')} here); use the model settings that "
            "it was trained with."
        )


def _shapes(config: ModelConfig) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_weights(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
