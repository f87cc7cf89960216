"""Orbax checkpoints of a run, and models from them.

Each holds up to four items, so that weights can be read without an optimizer to hang them on:

    weights     {"params": ..., "ema": ...}, each with BatchNorm's statistics where there are any; all the arrays of a
                best or a converted checkpoint
    progress    step, optimizer state and key
    data        JSON: where the run stood (`Position`)
    seal        JSON: fingerprints of all that, by which a damaged file is known
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax
import orbax.checkpoint as ocp
from flax import nnx

from top_jax import distributed
from top_jax.config import ModelConfig
from top_jax.errors import InputError, RunError
from top_jax.models import Backbone, abstract_model
from top_jax.models.weights import Weights, split_weights, weights_of
from top_jax.pruning import make_reduction
from top_jax.training.fingerprint import fingerprint
from top_jax.training.run_directory import RunDirectory
from top_jax.training.state import TrainState

logger = logging.getLogger(__name__)

Position = dict[str, Any]
"""Where a run stands, as JSON: `batches` taken from the stream (`Batches.get_state`), the numbers of those that were
`skipped` because they gave a number that is not finite, and whether this step has been `evaluated` (0 or 1)."""

SLACK_BYTES: Final = 2_000_000  # of metadata around the arrays, and of metrics until the next checkpoint


class Checkpoints:
    """`latest/` (the last two, whole) and `best/` (one, weights only). Saving is asynchronous, and atomic.

    Of several processes each makes one, on the same directory, and calls the same methods; Orbax has each write its own
    part of an array.
    """

    def __init__(self, directory: Path):
        # What a kill left half-written is removed: a run has its directory to itself (RunDirectory.lock).
        keep_two = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        keep_best = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=_accuracy, cleanup_tmp_directories=True)
        self._directory = directory
        self._latest = ocp.CheckpointManager(directory / "latest", options=keep_two)
        with distributed.together():
            if distributed.is_primary():
                _set_best_aside(directory)
        self._best = ocp.CheckpointManager(directory / "best", options=keep_best)

    def save(self, state: TrainState, position: Position) -> None:
        """Saves everything; returns once the state is copied from the devices. No second save of one step."""
        step = int(state.step)
        if step == self._latest.latest_step():
            return
        # First the best is whole: once this state is there, no later start evaluates the step again.
        self._make_sure_of_room(state)
        items = {"weights": state.weights(), "progress": _progress(state)}
        self._latest.save(step, args=_sealed(items, position=position))

    def save_if_best(self, state: TrainState, accuracy: float) -> None:
        """Saves the weights where they beat the best so far."""
        best = self.best_accuracy()
        if best is None or accuracy > best:
            step = int(state.step)
            if step in self._best.all_steps():  # of an earlier start on another machine, whose numbers differ a little
                self._best.delete(step)
            self._make_sure_of_room(state.weights())
            metrics = {"accuracy": accuracy}
            items = _sealed({"weights": state.weights()}, metrics=metrics)
            # Forced, because a killed start may have left a best checkpoint of a step that is yet to come.
            self._best.save(step, args=items, metrics=metrics, force=True)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._latest.latest_step()

    def best_accuracy(self) -> float | None:
        """Accuracy of the best checkpoint."""
        self._best.wait_until_finished()  # its file is read
        best = self._best.best_step()
        metrics = None if best is None else self._best.metrics(best)
        return None if metrics is None else _accuracy(metrics)

    def restore(self, like: TrainState) -> tuple[TrainState, Position] | None:
        """The newest state that can be read, placed as `like` is, with its position; None where nothing was saved.

        A newer one that is damaged is told of and moved into `damaged/`: a run that goes on will save its step again.

        Raises:
            RunError: there are checkpoints, and each is damaged.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._latest.all_steps(), reverse=True):
            try:
                with _quietly(), distributed.together():
                    restored = self._restore(step, like)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                damaged[step] = _reason(error)
                continue
            self._set_aside(damaged, good=step)
            return restored
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise RunError(
                f"no checkpoint in {self._directory / 'latest'} can be read ({reasons}). Restore one from a copy, or "
                "delete the run directory and start again."
            )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Position]:
        items = {"weights": like.weights(), "progress": _progress(like)}
        found = self._latest.restore(step, args=_to_restore(items, data=ocp.args.JsonRestore()))
        _check_seal(self._latest, step, {name: found[name] for name in items}, found["data"])
        weights, progress = found["weights"], found["progress"]
        params, stats = split_weights(weights["params"], like=like.stats)
        state = TrainState(params=params, stats=stats, ema=weights.get("ema"), **progress)
        return state, found["data"]

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        for step, reason in damaged.items():
            place = self._directory / "damaged" / f"{step}"
            logger.warning(
                "the checkpoint of step %d is damaged (%s): moved to %s; going on from the one of step %d",
                *(step, reason, place, good),
            )
            if distributed.is_primary():
                _move(self._directory / "latest" / str(step), place)
        if damaged:
            with distributed.together():  # nobody looks before they are gone
                pass
            self._latest.reload()

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
        if distributed.any_process(free < needed):
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
    weights = abstract_weights(config.model)
    like = {"params": weights, "ema": weights} if kept_ema else {"params": weights}
    try:
        with _quietly():
            found = _read_weights(run.checkpoints / which, like, by_accuracy=which == "best")
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise RunError(
            f"the {which!r} checkpoint of {run.path} cannot be read ({_reason(error)}); choose the other of best and "
            "latest, or restore it from a copy."
        ) from error
    if found is None:
        raise InputError(
            f"{run.path} has no {which!r} checkpoint yet; train on, or choose the other of best and latest."
        )
    return found["ema" if (kept_ema if ema is None else ema) else "params"]


def _read_weights(folder: Path, like: dict[str, Weights], by_accuracy: bool) -> dict[str, Weights] | None:
    """The newest, or the most accurate, of the checkpoints in a folder; None where there is none."""
    options = ocp.CheckpointManagerOptions(
        create=False, read_only=True, save_interval_steps=0, best_fn=_accuracy if by_accuracy else None
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        step = manager.best_step()  # without accuracy, the latest
        if step is None:
            step = manager.latest_step()  # a converted checkpoint has no accuracy
        if step is None:
            return None
        found = manager.restore(step, args=_to_restore({"weights": like}))["weights"]
        _check_seal(manager, step, {"weights": found})
        return found


def save_weights(run: RunDirectory, weights: Weights) -> None:
    """Writes a run directory's `best` and `latest` from weights alone, as a converted checkpoint has them."""
    for which in ("best", "latest"):
        with ocp.CheckpointManager(run.checkpoints / which) as manager:
            manager.save(0, args=_sealed({"weights": {"params": weights}}))


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


def _progress(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _sealed(
    arrays: dict[str, Any], *, position: Position | None = None, metrics: dict[str, float] | None = None
) -> ocp.args.Composite:
    """What is to be saved, with the fingerprint of each item; `metrics` the manager itself saves."""
    items: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in arrays.items()}
    seal = {name: fingerprint(item) for name, item in arrays.items()}
    if position is not None:
        items["data"], seal["data"] = ocp.args.JsonSave(position), _checksum(position)
    if metrics is not None:
        seal["metrics"] = _checksum(metrics)
    return ocp.args.Composite(**items, seal=ocp.args.JsonSave(seal))


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _to_restore(items: dict[str, Any], **more: Any) -> ocp.args.Composite:
    abstract = {name: ocp.args.StandardRestore(_abstract(item)) for name, item in items.items()}
    return ocp.args.Composite(**abstract, **more)


def _check_seal(
    manager: ocp.CheckpointManager, step: int, arrays: dict[str, Any], position: Position | None = None
) -> None:
    """Raises ValueError where an item is not what was saved."""
    seal = manager.restore(step, args=ocp.args.Composite(seal=ocp.args.JsonRestore()))["seal"]
    found = {name: fingerprint(item) for name, item in arrays.items()}
    if position is not None:
        found["data"] = _checksum(position)
    if broken := [name for name in found if found[name] != seal.get(name)]:
        raise ValueError(f"its {' and '.join(broken)} differ from what was saved")


def _set_best_aside(directory: Path) -> None:
    """Moves a best checkpoint whose accuracy is not what was saved out of the way; Orbax could not even list it."""
    for folder in (directory / "best").glob("*"):
        if not folder.name.isdigit():
            continue
        try:
            wanted = json.loads((folder / "seal" / "metadata").read_text()).get("metrics")  # a converted one has none
            if wanted is not None and _checksum(json.loads((folder / "metrics" / "metrics").read_text())) != wanted:
                raise ValueError("its accuracy differs from what was saved")
        except (OSError, ValueError) as error:
            place = directory / "damaged" / f"best-{folder.name}"
            logger.warning("the best checkpoint is damaged (%s): moved to %s; the next one is kept", error, place)
            _move(folder, place)


def _move(folder: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what Orbax says about a damaged file off the terminal: whoever reads it says it in one line.

    It gives up at the first array that cannot be read. The threads that read the others then find no one waiting, which
    they tell Python's hook for errors that no one can catch, some of them later than this block ends.
    """
    absl, asyncio, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    levels = absl.level, asyncio.level

    def without_late_reads(found: Any) -> None:
        of_orbax = inspect.iscoroutine(found.object) and "orbax" in found.object.cr_code.co_filename
        if not of_orbax and str(found.exc_value) != "Event loop is closed":
            hook(found)

    absl.setLevel(logging.CRITICAL + 1)
    asyncio.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_reads
    try:
        yield
    finally:
        absl.setLevel(levels[0])
    asyncio.setLevel(levels[1])  # these two not where something was raised, because of what comes later
    sys.unraisablehook = hook


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _reason(error: BaseException) -> str:
    """The first line of what was wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:200]
