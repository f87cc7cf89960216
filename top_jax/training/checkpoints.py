"""Orbax checkpoints of a run: saved as it goes, and restored whatever has become of them.

Each holds up to four items, so that weights can be read without an optimizer to hang them on:

    weights     {"params": ..., "ema": ...}, each with BatchNorm's statistics where there are any; all the arrays of a
                best or a converted checkpoint, and of a teacher that a run keeps
    progress    step, optimizer state and key
    data        JSON: where the run stood (`Position`)
    seal        JSON: fingerprints of all that, by which a damaged file is known
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Final

import jax
import orbax.checkpoint as ocp

from top_jax import distributed
from top_jax.errors import RunError
from top_jax.models.weights import split_weights
from top_jax.training.saved_weights import accuracy_of
from top_jax.training.seals import check_metrics, reason, restore_sealed, sealed
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
        keep_best = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=accuracy_of, cleanup_tmp_directories=True)
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
        self._latest.save(step, args=sealed(items, data=position))

    def save_if_best(self, state: TrainState, accuracy: float) -> None:
        """Saves the weights where they beat the best so far."""
        best = self.best_accuracy()
        if best is None or accuracy > best:
            step = int(state.step)
            if step in self._best.all_steps():  # of an earlier start on another machine, whose numbers differ a little
                self._best.delete(step)
            self._make_sure_of_room(state.weights())
            metrics = {"accuracy": accuracy}
            items = sealed({"weights": state.weights()}, metrics=metrics)
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
        return None if metrics is None else accuracy_of(metrics)

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
                with distributed.together():
                    restored = self._restore(step, like)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                damaged[step] = reason(error)
                continue
            self._set_aside(damaged, good=step)
            return restored
        if damaged:
            reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise RunError(
                f"no checkpoint in {self._directory / 'latest'} can be read ({reasons}). Restore one from a copy, or "
                "delete the run directory and start again."
            )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Position]:
        items = {"weights": like.weights(), "progress": _progress(like)}
        found = restore_sealed(self._latest, step, items, with_data=True)
        weights, progress = found["weights"], found["progress"]
        params, stats = split_weights(weights["params"], like=like.stats)
        state = TrainState(params=params, stats=stats, ema=weights.get("ema"), **progress)
        return state, found["data"]

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        for step, why in damaged.items():
            place = self._directory / "damaged" / f"{step}"
            logger.warning(
                "the checkpoint of step %d is damaged (%s): moved to %s; going on from the one of step %d",
                *(step, why, place, good),
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


def _progress(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _set_best_aside(directory: Path) -> None:
    """Moves a best checkpoint whose accuracy is not what was saved out of the way."""
    for folder in (directory / "best").glob("*"):
        if not folder.name.isdigit():
            continue
        try:
            check_metrics(folder)
        except (OSError, ValueError) as error:
            place = directory / "damaged" / f"best-{folder.name}"
            logger.warning("the best checkpoint is damaged (%s): moved to %s; the next one is kept", error, place)
            _move(folder, place)


def _move(folder: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
