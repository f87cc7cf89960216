"""The training loop: step, evaluate, save, and roll back after a value that is not finite."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from top_jax import distributed, files
from top_jax.config import RunConfig
from top_jax.data import Batches, infer, prefetch_to_device
from top_jax.errors import RunError
from top_jax.evaluation.accuracy import evaluate
from top_jax.evaluation.flops.of_config import costs
from top_jax.memory import peak_memory
from top_jax.models.weights import Weights
from top_jax.optional import require
from top_jax.training.checkpoints import Checkpoints, Position
from top_jax.training.interruption import Agreement, Interruption
from top_jax.training.prepare import Prepared, prepare
from top_jax.training.programs import TrainPrograms, enable_compilation_cache
from top_jax.training.reporting import Reporter, Silence, Throughput, Values, announce, conclusion, make_reporter
from top_jax.training.run_directory import RunDirectory
from top_jax.training.steps import METRICS, TrainState
from top_jax.values import refused

logger = logging.getLogger(__name__)

Summary = dict[str, Any]


def train(config: RunConfig, workdir: str | Path) -> Summary | None:
    """Trains the run that `config` describes, or resumes it.

    A run that was killed and restarted gives the same numbers as one that never stopped. SIGTERM (and Ctrl-C) saves
    after the current step and returns. After a loss, gradient or weight that is not finite the run goes back to its
    last checkpoint and continues without that batch.

    With several processes (`top_jax.distributed`) each calls this with the same config and the same directory, on a
    file system that they share.

    Args:
        config: all sections (`top_jax.config`).
        workdir: the run directory; created if it does not exist.

    Returns:
        The content of summary.json; None where a signal ended the run early.

    Raises:
        InputError: bad input, before anything is written, a package of the extra `train` that is not installed, or a
            checkpoint of another layout.
        RunError: too many values that are not finite, a full disk, only damaged checkpoints, or another process that
            failed.
    """
    if not isinstance(config, RunConfig):
        raise refused("config", config, "a RunConfig, such as RunConfig.from_config_dict(make_config(...))")
    require("grain", "tensorboardX", purpose="training")  # checked now, although used much later
    config = infer(config)
    enable_compilation_cache()
    with contextlib.ExitStack() as held:
        signals = held.enter_context(Interruption())
        with distributed.together():
            prepared = prepare(config, RunDirectory(workdir))
            held.enter_context(_faults(prepared.run))
            held.enter_context(prepared.run.lock())
        prepared.claim()
        checkpoints = held.enter_context(Checkpoints(prepared.run.checkpoints))
        state, position = prepared.start(checkpoints)
        first_step, total_steps = int(state.step), prepared.plan.total_steps
        reporter = held.enter_context(
            make_reporter(prepared.run, first_step=first_step, total_steps=total_steps, config=prepared.plan.config)
        )
        announce(prepared, reporter, first_step)
        summary = _earlier_summary(prepared) if first_step == total_steps else None
        if distributed.any_process(summary is None):
            summary = Loop(prepared, checkpoints, reporter, signals).train(state, position)
        if summary is not None:
            for line in conclusion(prepared, summary):
                reporter.say(line)
        return summary


def _another_form(prepared: Prepared, summary: Summary) -> Exception | None:
    """Returns why numbers from a possibly damaged file cannot be those of a summary; None if they can."""
    try:
        conclusion(prepared, summary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        return error
    return None


def _earlier_summary(prepared: Prepared) -> Summary | None:
    """Returns summary.json as an earlier start wrote it; None, after a warning, if it has another form."""
    summary = prepared.run.read_json("summary.json")
    if summary is None:
        return None
    if (error := _another_form(prepared, summary)) is not None:
        logger.warning(
            "%s is not in the expected form (%s: %s); it is written again",
            prepared.run.path / "summary.json",
            type(error).__name__,
            error,
        )
        return None
    return summary


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that the devices may still be working on."""

    step: int  # number of steps including this one
    position: Position
    metrics: dict[str, jax.Array]


class Loop:
    """Runs the steps of one start of a run, to the end of the run or to a signal.

    Args:
        prepared: the prepared run, already claimed.
        checkpoints: checkpoints of its directory.
        reporter: this process's reporter.
        signals: the active `Interruption`.
    """

    def __init__(
        self, prepared: Prepared, checkpoints: Checkpoints, reporter: Reporter | Silence, signals: Interruption
    ):
        self.prepared = prepared
        self.plan = prepared.plan
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.signals = signals
        self.stop = Agreement(signals)
        self.throughput = Throughput()
        self.last_evaluation: Values = {}
        self.skipped: list[int] = []
        self.train_step = TrainPrograms(self.plan, prepared.teacher_weights)
        self.eval_step = self.plan.task.make_eval_step(self.plan.model, self.plan.config.data)
        self._dispatched: collections.deque[Dispatched] = collections.deque()

    def train(self, state: TrainState, position: Position) -> Summary | None:
        """Runs to the end, and returns and writes the summary; None where a signal ended the run early."""
        if not self.run(state, position):
            kept = self.checkpoints.latest_step()
            what = "nothing to save yet" if kept is None else f"saved at step {kept}"
            who = self.signals.requested or "a signal to another process"
            self.reporter.say(f"{who}: {what}; start the same command again to go on.")
            return None
        summary = self.summary()
        if distributed.is_primary():
            self.prepared.run.write_json("summary.json", summary)
        return summary

    def run(self, state: TrainState, position: Position) -> bool:
        """Runs steps until the end (returns True) or a signal (False), and saves the state."""
        while True:
            try:
                return self._run(state, position)
            except _NotFinite as error:
                found = error.with_traceback(None)  # its frames would keep the state in memory while another is read
            state, position = self._roll_back(found)

    def _has_evaluation(self) -> bool:
        """Whether the last evaluation is known and complete: a flipped bit of metrics.jsonl may rename a metric."""
        return bool(self.last_evaluation) and _another_form(self.prepared, self.summary()) is None

    def summary(self) -> Summary:
        """Returns the content of summary.json."""
        rates = self.throughput.overall()
        return {
            "steps": self.plan.total_steps,
            **self.last_evaluation,
            f"best_{self.plan.task.score}": self.checkpoints.best_score(),
            "best_step": self.checkpoints.best_step(),
            "skipped_batches": self.skipped,
            **costs(self.plan.config),
            "train_images_per_second": rates["images_per_second"],
            "data_wait": rates["data_wait"],
            "step_memory": self.train_step.memory(),
            "peak_memory": peak_memory(),
            "device": jax.devices()[0].device_kind,
        }

    def _run(self, state: TrainState, position: Position) -> bool:
        """Runs as `run` does, but raises _NotFinite.

        A step's metrics are read after the next step is dispatched, so that the devices are never idle. Before an
        evaluation or a save, and at the end, all of them are read.
        """
        plan, step = self.plan, int(state.step)
        self.skipped = list(position["skipped"])
        evaluated = bool(position["evaluated"])  # False if a signal stopped the evaluation of this step
        if evaluated and step == plan.total_steps:  # the run was killed after its last checkpoint
            self.last_evaluation = distributed.from_primary(self.reporter.reported("eval") or {})
            if distributed.any_process(self.checkpoints.best_score() is None):  # the best checkpoint was damaged
                self.last_evaluation = {}
            evaluated = self._has_evaluation()
        if not evaluated:
            evaluated = self._evaluate(state, step)
        stop = not evaluated or bool(distributed.any_process(self.signals.requested is not None))
        with self.prepared.train_batches() as batches:
            stream = self._batches(batches, position)
            while step < plan.total_steps and not stop:
                with self.throughput.waiting():
                    batch, position = next(stream)
                if not self.train_step.is_compiled(step):
                    self._settle(leave=0)
                    self.throughput.pause()
                    self.reporter.say("compiling the train step ...")
                state, metrics = self.train_step(step, state, batch)
                step += 1
                self._dispatched.append(Dispatched(step, position, metrics))
                evaluates = step % plan.eval_every == 0 or step == plan.total_steps
                saves = evaluates or step % plan.config.checkpoint_every == 0
                self._settle(leave=0 if saves else 1)
                if evaluates:
                    evaluated = self._evaluate(state, step)
                if saves:
                    self._save(state, position, evaluated)
                stop = self.stop.decide() or not evaluated
        self._settle(leave=0)
        if step > 0:
            self._save(state, position, evaluated)
            self.checkpoints.wait()
        return step == plan.total_steps and evaluated

    def _batches(self, batches: Batches, position: Position) -> Iterator[tuple[dict[str, jax.Array], Position]]:
        """Yields the batches from `position` on, without those to skip, and the position after each."""
        batches.set_state(position)
        for batch, after in prefetch_to_device(batches, self.plan.by_image, self.plan.config.data.prefetch):
            if after["batches"] - 1 not in self.skipped:
                yield batch, {**after, "skipped": self.skipped}

    def _settle(self, leave: int) -> None:
        """Reads the metrics of the dispatched steps, except the last `leave` of them."""
        while len(self._dispatched) > leave:
            self._after_step(self._dispatched.popleft())

    def _after_step(self, done: Dispatched) -> None:
        step, values = done.step, {name: float(done.metrics[name]) for name in METRICS if name in done.metrics}
        for name, value in values.items():
            if not math.isfinite(value):
                raise _NotFinite(name, value, step, batch=done.position["batches"] - 1)
        self.throughput.add(self.plan.config.batch_size)
        if step % self.plan.config.log_every == 0 or step == self.plan.total_steps:
            values["learning_rate"] = float(np.asarray(self.plan.schedule(step - 1)))
            self.reporter.metrics("train", step, {**values, **self.throughput.recent()})
        shown = {name: values[name] for name in self.plan.task.shown}
        self.reporter.step(step, {**shown, **self.throughput.overall()})

    def _roll_back(self, found: _NotFinite) -> tuple[TrainState, Position]:
        """Returns the last checkpoint, to continue from it without the batch that gave the bad value.

        Raises:
            RunError: `max_rollbacks` batches have been skipped already.
        """
        self._dispatched.clear()
        skipped, limit = sorted({*self.skipped, found.batch}), self.plan.config.max_rollbacks
        kept = self.checkpoints.latest_step()
        if len(skipped) > limit:
            raise RunError(
                f"{found}, and {limit} batches were already skipped for the same reason (max_rollbacks); "
                + ("nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept")
                + ". Lower optimizer.learning_rate, or set optimizer.clip_norm."
            )
        self.throughput.pause()
        state, position = self.prepared.start(self.checkpoints)
        step = int(state.step)
        self.reporter.say(
            f"{found}: back to step {step}, going on without batch {found.batch} "
            f"({len(skipped)} skipped so far, {limit} at most)"
        )
        self.reporter.rewind(step)
        return state, {**position, "skipped": skipped}

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Evaluates the weights and, if it is kept, their average, which then determines the best checkpoint.

        Returns:
            False if a signal stopped it.
        """
        self.throughput.pause()
        evaluation: Values = {}
        for name, weights in state.weights().items():
            with self.reporter.evaluating(len(self.prepared.eval_source)) as advance:
                result = self._evaluate_weights(weights, advance)
            if result is None:
                return False
            prefix = "" if name == "params" else f"{name}_"
            evaluation |= {f"{prefix}{key}": value for key, value in result.items()}
        self.last_evaluation = evaluation
        name = self.plan.task.score
        score = evaluation.get(f"ema_{name}", evaluation[name])
        assert score is not None
        self.reporter.metrics("eval", step, evaluation)
        self.checkpoints.save_if_best(state, float(score), name=name)
        self.throughput.resume()
        return True

    def _evaluate_weights(self, weights: Weights, advance: Callable[[int], None]) -> Values | None:
        def on_batch(images: int) -> None:
            if distributed.any_process(self.signals.requested is not None):
                raise _Stopped
            advance(images)

        plan = self.plan
        try:
            return evaluate(
                self.eval_step,
                weights,
                self.prepared.eval_batches(),
                plan.by_image,
                prefetch=plan.config.data.prefetch,
                on_batch=on_batch,
                summarize=plan.task.summarize,
            )
        except _Stopped:
            return None

    def _save(self, state: TrainState, position: Position, evaluated: bool) -> None:
        self.throughput.pause()
        with distributed.together():
            self.prepared.run.check_in_place()
        self.checkpoints.save(state, {**position, "evaluated": int(evaluated)})
        self.throughput.resume()


class _Stopped(Exception):
    """Raised when a signal arrives during an evaluation."""


class _NotFinite(Exception):
    """Raised when a step gives a value that is not finite."""

    def __init__(self, name: str, value: float, step: int, batch: int):
        super().__init__(f"the {name} of step {step} is {value}")
        self.batch = batch  # number of the batch in the stream


@contextlib.contextmanager
def _faults(run: RunDirectory) -> Iterator[None]:
    """Turns errors from a full disk, a moved run directory or a lost process into a RunError."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if (lost := distributed.lost_process(error)) is not None:
            raise lost from error
        try:
            run.check_in_place()
        except RunError as moved:
            raise moved from error
        if files.is_full(error):
            raise RunError(
                "the disk is full: this write failed, and the last complete checkpoint is kept. "
                "Make room and start the same command again."
            ) from error
        raise
