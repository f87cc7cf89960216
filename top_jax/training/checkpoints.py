"""Saves Orbax checkpoints of a run, and restores the newest intact one.

Each holds up to four items, so that weights can be read without an optimizer:

    weights     {"params": ..., "ema": ...}, each with BatchNorm's statistics if the model has any. A best or a
                converted checkpoint, or a run's copy of its teacher, has no other arrays
    progress    step, optimizer state and key
    data        JSON: the run's `Position`
    seal        JSON: a fingerprint of each other item, which reveals damage (`top_jax.training.seals`)
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from top_jax import distributed
from top_jax.errors import RunError
from top_jax.models.weights import split_weights
from top_jax.training.seals import Damaged, check_metrics, restore_sealed, sealed
from top_jax.training.steps import TrainState
from top_jax.training.weights import check_room, score_of

logger = logging.getLogger(__name__)

Position = dict[str, Any]
"""Position of a run, as JSON. `batches`: how many were taken from the stream (`Batches.get_state`). `skipped`: numbers
of those that were left out because they gave a NaN or infinity. `evaluated`: whether this step has been (0 or 1)."""


class Checkpoints:
    """Keeps `latest/` (the last two, complete) and `best/` (one, weights only). Saving is asynchronous and atomic.

    With several processes, each creates one on the same directory and calls the same methods. With Orbax each process
    writes its own part of an array.

    Args:
        directory: the run's checkpoints/.
    """

    def __init__(self, directory: Path):
        # Removes what a kill left half-written: no other process trains here (RunDirectory.lock).
        keep_two = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        keep_best = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=score_of, cleanup_tmp_directories=True)
        self._directory = directory
        self._latest = ocp.CheckpointManager(directory / "latest", options=keep_two)
        with distributed.together():
            if distributed.is_primary():
                _set_best_aside(directory)
        self._best = ocp.CheckpointManager(directory / "best", options=keep_best)

    def save(self, state: TrainState, position: Position) -> None:
        """Saves everything, at most once per step; returns when the state is copied from the devices."""
        step = int(state.step)
        if step == self._latest.latest_step():
            return
        # Waits for the best checkpoint first: once this state is there, no later start evaluates the step again.
        self._make_sure_of_room(state)
        items = {"weights": state.weights(), "progress": _progress(state)}
        self._latest.save(step, args=sealed(items, data=position))

    def save_if_best(self, state: TrainState, score: float, *, name: str = "accuracy") -> None:
        """Saves the weights if their score is higher than the best so far; `name` is one of `SCORES`."""
        best = self.best_score()
        if best is None or score > best:
            step = int(state.step)
            if (
                step in self._best.all_steps()
            ):  # saved by an earlier start on another machine, with slightly other numbers
                self._best.delete(step)
            self._make_sure_of_room(state.weights())
            metrics = {name: score}
            items = sealed({"weights": state.weights()}, metrics=metrics)
            # Forced, because a killed start may have left a best checkpoint of a later step.
            self._best.save(step, args=items, metrics=metrics, force=True)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None without one."""
        return self._latest.latest_step()

    def best_score(self) -> float | None:
        """Returns the accuracy, or the mIoU, of the best checkpoint; None without one."""
        self._best.wait_until_finished()  # its file is read
        best = self._best.best_step()
        metrics = None if best is None else self._best.metrics(best)
        return None if metrics is None else score_of(metrics)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None without one."""
        self._best.wait_until_finished()
        return self._best.best_step()

    def restore(self, like: TrainState) -> tuple[TrainState, Position] | None:
        """Restores the newest intact checkpoint.

        Newer ones, which are damaged, are reported and moved into `damaged/`: a run that continues saves their steps
        again.

        Args:
            like: shapes, dtypes and shardings of the state.

        Returns:
            The state and its position; None where nothing was saved.

        Raises:
            RunError: every checkpoint is damaged; nothing is moved.
            InputError: the newest intact checkpoint has another layout; nothing is moved.
            MemoryError, jax.errors.JaxRuntimeError, OSError: a limit of this machine; nothing is moved.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._latest.all_steps(), reverse=True):
            with distributed.together():  # for errors other than damage, which end the run in all processes
                found = self._restore(step, like)
            if distributed.any_process(isinstance(found, Damaged)):
                damaged[step] = str(found) if isinstance(found, Damaged) else "another process cannot read it"
            elif not isinstance(found, Damaged):
                self._set_aside(damaged, good=step)
                return found
        if damaged:
            reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise RunError(
                f"every checkpoint in {self._directory / 'latest'} is damaged ({reasons}). Restore one from a copy, or "
                "start again with another --workdir."
            )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Position] | Damaged:
        try:
            return self._restore_sound(step, like)
        except Damaged as error:
            return error.with_traceback(None)  # its frames would keep what was read in memory

    def _restore_sound(self, step: int, like: TrainState) -> tuple[TrainState, Position]:
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
                "the checkpoint of step %d is damaged (%s): moved to %s; going on from step %d",
                *(step, why, place, good),
            )
            if distributed.is_primary():
                _move(self._directory / "latest" / str(step), place)
        if damaged:
            with distributed.together():  # no process lists the folder before they are moved
                pass
            self._latest.reload()

    def wait(self) -> None:
        """Waits until everything is on disk; raises the errors of saves in the background."""
        for manager in (self._latest, self._best):
            manager.wait_until_finished()
            manager.check_for_errors()

    def _make_sure_of_room(self, content: Any) -> None:
        """Waits for earlier saves, then raises RunError if the disk has no room for another one."""
        self.wait()
        step = self.latest_step()
        check_room(self._directory, content, kept="" if step is None else f"the checkpoint of step {step} is kept")

    def close(self) -> None:
        """Waits for saves in the background and releases the directory."""
        self._latest.close()
        self._best.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if distributed.lost_process(error) is None:  # a save that waits for a lost process never ends
            self.close()


def _progress(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _set_best_aside(directory: Path) -> None:
    """Moves a best checkpoint into `damaged/` if its score differs from the saved one."""
    for folder in (directory / "best").glob("*"):
        if not folder.name.isdigit():
            continue
        try:
            check_metrics(folder)
        except (OSError, ValueError) as error:
            place = directory / "damaged" / f"best-{folder.name}"
            logger.warning(
                "the best checkpoint is damaged (%s): moved to %s; the next evaluation saves a new one", error, place
            )
            _move(folder, place)


def _move(folder: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
