"""Orbax checkpoints of a run, and models from them.

Each holds up to three items, so that weights can be read without an optimizer to hang them on:

    weights     {"params": ..., "ema": ...}, each with BatchNorm's statistics where there are any; the only item of a
                best or a converted checkpoint, and of a teacher that a run keeps
    progress    step, optimizer state and key
    data        JSON: where the data iterator stood after the last batch that was trained on
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import jax
import orbax.checkpoint as ocp
from flax import nnx

from top_jax.config import ModelConfig
from top_jax.errors import InputError, RunError
from top_jax.models import Backbone, abstract_model
from top_jax.models.weights import Weights, split_weights, weights_of
from top_jax.pruning import make_reduction
from top_jax.training.run_directory import RunDirectory
from top_jax.training.state import TrainState

SLACK_BYTES: Final = 2_000_000  # of metadata around the arrays, and of metrics until the next checkpoint


class Checkpoints:
    """`latest/` (the last two, whole) and `best/` (one, weights only). Saving is asynchronous, and atomic."""

    def __init__(self, directory: Path):
        # What a kill left half-written is removed: a run has its directory to itself (RunDirectory.lock).
        keep_two = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        keep_best = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=_accuracy, cleanup_tmp_directories=True)
        self._directory = directory
        self._latest = ocp.CheckpointManager(directory / "latest", options=keep_two)
        self._best = ocp.CheckpointManager(directory / "best", options=keep_best)

    def save(self, state: TrainState, data_state: dict[str, int]) -> None:
        """Saves everything; returns once the state is copied from the devices. No second save of one step."""
        step = int(state.step)
        if step == self._latest.latest_step():
            return
        # First the best is whole: once this state is there, no later start evaluates the step again.
        self._make_sure_of_room(state)
        progress = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        items = ocp.args.Composite(
            weights=ocp.args.StandardSave(state.weights()),
            progress=ocp.args.StandardSave(progress),
            data=ocp.args.JsonSave(data_state),
        )
        self._latest.save(step, args=items)

    def save_if_best(self, state: TrainState, accuracy: float) -> None:
        """Saves the weights where they beat the best so far."""
        best = self.best_accuracy()
        if best is None or accuracy > best:
            step = int(state.step)
            if step in self._best.all_steps():  # of an earlier start on another machine, whose numbers differ a little
                self._best.delete(step)
            self._make_sure_of_room(state.weights())
            items = ocp.args.Composite(weights=ocp.args.StandardSave(state.weights()))
            # Forced, because a killed start may have left a best checkpoint of a step that is yet to come.
            self._best.save(step, args=items, metrics={"accuracy": accuracy}, force=True)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._latest.latest_step()

    def best_accuracy(self) -> float | None:
        """Accuracy of the best checkpoint."""
        self._best.wait_until_finished()  # its file is read
        best = self._best.best_step()
        metrics = None if best is None else self._best.metrics(best)
        return None if metrics is None else _accuracy(metrics)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, int]] | None:
        """The newest state, placed as `like` is, with its data state; None where nothing was saved."""
        step = self._latest.latest_step()
        if step is None:
            return None
        progress = {"step": like.step, "opt_state": like.opt_state, "key": like.key}
        items = ocp.args.Composite(
            weights=ocp.args.StandardRestore(_abstract(like.weights())),
            progress=ocp.args.StandardRestore(_abstract(progress)),
            data=ocp.args.JsonRestore(),
        )
        found = self._latest.restore(step, args=items)
        weights, progress = found["weights"], found["progress"]
        params, stats = split_weights(weights["params"], like=like.stats)
        return TrainState(params=params, stats=stats, ema=weights.get("ema"), **progress), found["data"]

    def wait(self) -> None:
        """Returns once everything is on disk; raises what went wrong on the way."""
        for manager in (self._latest, self._best):
            manager.wait_until_finished()
            manager.check_for_errors()

    def _make_sure_of_room(self, content: Any) -> None:
        """Waits for earlier saves, then raises RunError where the disk has no room for another one.

        Looked at before, because Orbax fails in its threads, each of which prints its own traceback.
        """
        self.wait()
        needed = int(1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(content))) + SLACK_BYTES
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            kept = self.latest_step()
            raise RunError(
                f"the disk is full: a checkpoint needs {needed / 1e6:.0f} MB and {self._directory} has "
                f"{free / 1e6:.0f} MB left; "
                + ("nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept")
                + ". Make room and start the same command again."
            )

    def close(self) -> None:
        """Waits and lets go."""
        self._latest.close()
        self._best.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
    pruning = make_reduction(**config.pruning.settings())
    model = abstract_model(config.model.name, pruning=pruning, **config.model.overrides())
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
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, best_fn=_accuracy if which == "best" else None)
    with ocp.CheckpointManager(run.checkpoints / which, options=options) as manager:
        step = manager.best_step()  # of `latest`, the latest
        if step is None:
            step = manager.latest_step()  # a converted checkpoint has no accuracy
        if step is None:
            raise InputError(
                f"{run.path} has no {which!r} checkpoint yet; train on, or choose the other of best and latest."
            )
        weights = abstract_weights(config.model)
        like = {"params": weights, "ema": weights} if kept_ema else {"params": weights}
        found = manager.restore(step, args=ocp.args.Composite(weights=ocp.args.StandardRestore(like)))
    return found["weights"]["ema" if (kept_ema if ema is None else ema) else "params"]


def save_weights(run: RunDirectory, weights: Weights, which: tuple[str, ...] = ("best", "latest")) -> None:
    """Writes checkpoints of a run directory from weights alone: as a converted one has them, or of its teacher."""
    for name in which:
        with ocp.CheckpointManager(run.checkpoints / name) as manager:
            manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave({"params": weights})))


def has_weights(run: RunDirectory, which: str) -> bool:
    """Whether `save_weights` has written that checkpoint, whole."""
    return (run.checkpoints / which / "0").is_dir()


def restore_weights(run: RunDirectory, which: str, config: ModelConfig) -> Weights:
    """What `save_weights` wrote, for the model of `config`, on the default device."""
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with ocp.CheckpointManager(run.checkpoints / which, options=options) as manager:
        like = ocp.args.StandardRestore({"params": abstract_weights(config)})
        return manager.restore(0, args=ocp.args.Composite(weights=like))["weights"]["params"]


def abstract_weights(config: ModelConfig) -> Weights:
    """Shapes of a model's weights, to restore into on the default device."""
    shapes = weights_of(abstract_model(config.name, **config.overrides()))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def fill(model: Backbone, weights: Weights) -> Backbone:
    """The model with these weights."""
    return nnx.merge(nnx.graphdef(model), weights)


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
