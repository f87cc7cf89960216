"""Weights in a run directory: models and weights from its checkpoints, and checkpoints of weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from top_jax.build import build_abstract_model, build_reduction
from top_jax.config import ModelConfig
from top_jax.errors import InputError, RunError
from top_jax.models import Backbone
from top_jax.models.weights import Weights, weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.seals import quietly, reason, restore_sealed, sealed


def load_checkpoint(path: str | Path, which: str = "best", ema: bool | None = None) -> Backbone:
    """The model of a run directory (of train.py or convert), with its weights and pruning, in eval mode.

    Args:
        path: the run directory.
        which: `best` (by evaluation accuracy) or `latest`.
        ema: the averaged weights; None takes them where the run kept them.

    Raises:
        InputError: no run directory, no such checkpoint, or no averaged weights in it.
    """
    run = RunDirectory(path)
    config = run.read_config()
    pruning = build_reduction(config.pruning)
    model = build_abstract_model(config.model, pruning)
    return fill(model, read_weights(run, which, ema))


def read_weights(run: RunDirectory, which: str = "best", ema: bool | None = None) -> Weights:
    """Weights of a run directory's checkpoint; arguments and errors as of `load_checkpoint`."""
    if which not in ("best", "latest"):
        raise InputError(f"which={which!r} is unknown; choose best or latest.")
    config = run.read_config()
    kept_ema = config.optimizer.ema_decay is not None
    if ema and not kept_ema:
        raise InputError(
            f"{run.path} kept no averaged weights (optimizer.ema_decay is not set); take the plain ones (ema=False, "
            "--noema)."
        )
    weights = abstract_weights(config.model)
    like = {"params": weights, "ema": weights} if kept_ema else {"params": weights}
    found = _read(run, which, like)
    return found["ema" if (kept_ema if ema is None else ema) else "params"]


def _read(run: RunDirectory, which: str, like: dict[str, Weights]) -> dict[str, Weights]:
    try:
        found = _read_newest(run.checkpoints / which, like, by_accuracy=which == "best")
    except Exception as error:  # whatever a damaged file makes Orbax raise
        otherwise = "choose the other of best and latest"
        if which == "teacher":
            otherwise = "delete it, to read it from distillation.teacher again"
        raise RunError(
            f"the {which!r} checkpoint of {run.path} cannot be read ({reason(error)}); {otherwise}, or restore it from "
            "a copy."
        ) from error
    if found is None:
        raise InputError(
            f"{run.path} has no {which!r} checkpoint yet; train on, or choose the other of best and latest."
        )
    return found


def _read_newest(folder: Path, like: dict[str, Weights], *, by_accuracy: bool) -> dict[str, Weights] | None:
    """The newest, or the most accurate, of the checkpoints in a folder; None where there is none."""
    options = ocp.CheckpointManagerOptions(
        create=False, read_only=True, save_interval_steps=0, best_fn=accuracy_of if by_accuracy else None
    )
    with quietly(), ocp.CheckpointManager(folder, options=options) as manager:  # Orbax tells that it only reads
        step = manager.best_step()  # without accuracy, the latest
        if step is None:
            step = manager.latest_step()  # a converted checkpoint has no accuracy
        return None if step is None else restore_sealed(manager, step, {"weights": like})["weights"]


def save_weights(run: RunDirectory, weights: Weights, which: tuple[str, ...] = ("best", "latest")) -> None:
    """Writes checkpoints of a run directory from weights alone: as a converted one has them, or of its teacher."""
    for name in which:
        with ocp.CheckpointManager(run.checkpoints / name) as manager:
            manager.save(0, args=sealed({"weights": {"params": weights}}))


def has_weights(run: RunDirectory, which: str) -> bool:
    """Whether `save_weights` has written that checkpoint, whole."""
    return (run.checkpoints / which / "0").is_dir()


def restore_weights(run: RunDirectory, which: str, config: ModelConfig) -> Weights:
    """What `save_weights` wrote, for the model of `config`, on the default device.

    Raises:
        RunError: it is damaged.
    """
    like = {"params": abstract_weights(config)}
    return _read(run, which, like)["params"]


def abstract_weights(config: ModelConfig) -> Weights:
    """Shapes of a model's weights, to restore into on the default device."""
    shapes = weights_of(build_abstract_model(config))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def fill(model: Backbone, weights: Weights) -> Backbone:
    """The model with these weights."""
    return nnx.merge(nnx.graphdef(model), weights)


def accuracy_of(metrics: Any) -> float:
    """What makes one checkpoint better than another."""
    return metrics["accuracy"]
