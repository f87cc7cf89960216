"""Reads and writes the weights that a run directory keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from top_jax import distributed
from top_jax.build import Model, build_abstract_model, build_reduction
from top_jax.config import ModelConfig
from top_jax.convert.checkpoint_files import weights_in_folder
from top_jax.convert.torch_checkpoint import HEADS, other_classes
from top_jax.errors import InputError, RunError
from top_jax.models import Segmenter
from top_jax.models.backbone import checked_rngs
from top_jax.models.weights import Weights, weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.seals import Damaged, reading, restore_sealed, sealed
from top_jax.values import flag, one_of, whole
from top_jax.values import path as path_of

SCORES: Final = ("accuracy", "miou")  # metrics that compare checkpoints: a classifier's, a segmenter's
SLACK_BYTES: Final = 2_000_000  # metadata around the arrays, and metrics until the next checkpoint


def load_checkpoint(
    path: str | Path,
    which: str = "best",
    ema: bool | None = None,
    *,
    num_classes: int | None = None,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Loads the model of a run directory, written by train.py or `top-jax convert`: weights and pruning, in eval mode.

    The run's config determines whether it is a classifier or a segmenter.

    Args:
        path: the run directory.
        which: `best` (by evaluation accuracy, or mIoU) or `latest`.
        ema: whether to take the averaged weights; None takes them where the run kept them.
        num_classes: width of the logits; None is the run's own, 0 leaves the head out.
        head: `load` takes the run's classifier; `new` gives the model one with random weights, for other classes.
        rngs: source of the weights of a new head, `nnx.Rngs(0)` by default; loaded weights do not depend on it.

    Raises:
        InputError: no run directory, no such checkpoint, no averaged weights in it, or another number of classes
            without `head="new"`.
        RunError: the checkpoint is damaged.
    """
    path, head, rngs = path_of("path", path), one_of("head", head, HEADS), checked_rngs(rngs)
    if file := weights_in_folder(path):
        raise InputError(
            f"{path} is not a run directory but a folder of another library, with {file.name}; load it with "
            "load_torch_checkpoint(path, MODEL_NAME), or convert it."
        )
    if path.is_file():
        raise InputError(f"{path} is a file, not a run directory; load it with top_jax.load_torch_checkpoint.")
    run = RunDirectory(path)
    config = run.read_config()
    trained = config.model.num_classes
    wanted = trained if num_classes is None else whole("num_classes", num_classes, 0)
    if head == "load" and wanted not in (0, trained):
        raise InputError(f"the weights of {run.path} do not fit. {other_classes(trained, wanted)}")
    model = build_abstract_model(config.model, build_reduction(config.pruning))
    model = fill(model, read_weights(run, which, ema))
    if isinstance(model, Segmenter):
        model.data = config.data
    if head == "new" or not wanted:
        model.reset_classifier(wanted, rngs)
    return model


def read_weights(run: RunDirectory, which: str = "best", ema: bool | None = None) -> Weights:
    """Reads the weights of a run directory's checkpoint; arguments and errors as for `load_checkpoint`."""
    one_of("which", which, ("best", "latest"))
    if ema is not None:
        ema = flag("ema", ema)
    config = run.read_config()
    kept_ema = config.optimizer.ema_decay is not None
    if ema and not kept_ema:
        raise InputError(
            f"{run.path} has no averaged weights (its optimizer.ema_decay is not set); use the plain ones (ema=False, "
            "--noema)."
        )
    weights = abstract_weights(config.model)
    like = {"params": weights, "ema": weights} if kept_ema else {"params": weights}
    other = "latest" if which == "best" else "best"
    found = _read(run, which, like, otherwise=f"choose the {other!r} one (which={other!r}, --which={other})")
    return found["ema" if (kept_ema if ema is None else ema) else "params"]


def which_weights(run: RunDirectory, which: str, ema: bool | None) -> dict[str, Any]:
    """Returns which weights `read_weights` reads, as JSON values: `which`, `step` and `ema`."""
    kept_ema = run.read_config().optimizer.ema_decay is not None
    with reading(), _manager(run.checkpoints / which, by_accuracy=which == "best") as manager:
        return {"which": which, "step": _newest(manager), "ema": kept_ema if ema is None else ema}


def _read(run: RunDirectory, which: str, like: dict[str, Weights], *, otherwise: str) -> dict[str, Weights]:
    try:
        found = _read_newest(run.checkpoints / which, like, by_accuracy=which == "best")
    except Damaged as error:
        raise RunError(
            f"the {which!r} checkpoint of {run.path} is damaged ({error}); {otherwise}, or restore it from a copy."
        ) from error
    if found is None:
        raise InputError(f"{run.path} has no {which!r} checkpoint yet; train on, or {otherwise}.")
    return found


def _read_newest(folder: Path, like: dict[str, Weights], *, by_accuracy: bool) -> dict[str, Weights] | None:
    """Reads the newest, or the most accurate, checkpoint in a folder; None where there is none."""
    with reading(), _manager(folder, by_accuracy=by_accuracy) as manager:
        step = _newest(manager)
        return None if step is None else restore_sealed(manager, step, {"weights": like})["weights"]


def _manager(folder: Path, *, by_accuracy: bool) -> ocp.CheckpointManager:
    best = score_of if by_accuracy else None
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, save_interval_steps=0, best_fn=best)
    return ocp.CheckpointManager(folder, options=options)


def _newest(manager: ocp.CheckpointManager) -> int | None:
    """Returns the step of the most accurate checkpoint, or of the latest where none has an accuracy."""
    step = manager.best_step()
    return manager.latest_step() if step is None else step  # a converted checkpoint has no accuracy


def check_room(folder: Path, content: Any, *, copies: int = 1, kept: str = "") -> None:
    """Raises RunError if the disk has no room for another checkpoint; with several processes all must call this.

    Checked before saving, because Orbax would fail in its threads, each of which prints its own traceback.

    Args:
        folder: a run's checkpoints/, which need not exist.
        content: arrays to save.
        copies: how many copies are saved.
        kept: what is saved already, for the message.
    """
    needed = copies * (int(1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(content))) + SLACK_BYTES)
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if distributed.any_process(free < needed):
        raise RunError(
            f"the disk is full: a checkpoint needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB left; "
            f"{kept or 'nothing was saved yet'}. Make room and start the same command again."
        )


def save_weights(run: RunDirectory, weights: Weights, which: tuple[str, ...] = ("best", "latest")) -> None:
    """Writes checkpoints that hold only weights, for a converted model or a teacher.

    Raises:
        RunError: the disk has no room for them; nothing is written.
    """
    check_room(run.checkpoints, weights, copies=len(which))
    for name in which:
        with ocp.CheckpointManager(run.checkpoints / name) as manager:
            manager.save(0, args=sealed({"weights": {"params": weights}}))


def keeps_teacher(run: RunDirectory) -> bool:
    """Returns whether the run directory holds a whole copy of its teacher, in checkpoints/teacher."""
    return (run.checkpoints / "teacher" / "0").is_dir()


def keep_teacher(run: RunDirectory, weights: Weights) -> None:
    """Writes the run's copy of its teacher, unless it is there; to be called once the directory is claimed."""
    if not keeps_teacher(run):
        # NumPy arrays: all processes have the same weights, and then one of them writes.
        save_weights(run, jax.tree.map(np.asarray, weights), which=("teacher",))


def read_teacher(run: RunDirectory, config: ModelConfig) -> Weights:
    """Reads the run's copy of its teacher, a dense model of `config`. Raises RunError if it is damaged."""
    like = {"params": abstract_weights(config)}
    return _read(run, "teacher", like, otherwise="delete it, to read it from distillation.teacher again")["params"]


def abstract_weights(config: ModelConfig) -> Weights:
    """Returns the shapes of a model's weights, to restore into on the default device."""
    shapes = weights_of(build_abstract_model(config))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def fill(model: Model, weights: Weights) -> Model:
    """Returns the model with these weights."""
    return nnx.merge(nnx.graphdef(model), weights)


def score_of(metrics: Any) -> float:
    """Returns the metric by which checkpoints are compared; the larger is better."""
    return next(metrics[name] for name in SCORES if name in metrics)
