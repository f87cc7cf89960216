"""The training loop: set up, restore, step, evaluate, save, and go back where a number is not finite."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from top_jax import distributed
from top_jax.config import RunConfig
from top_jax.data import Batches, prefetch_to_device
from top_jax.errors import RunError
from top_jax.evaluation.accuracy import evaluate, make_eval_step
from top_jax.evaluation.flops import count_macs
from top_jax.memory import peak_memory
from top_jax.models.weights import Weights
from top_jax.training.checkpoints import Checkpoints, Position
from top_jax.training.compilation_cache import enable_compilation_cache
from top_jax.training.interruption import Agreement, Interruption
from top_jax.training.messages import announce, conclude
from top_jax.training.plan import Plan, make_plan
from top_jax.training.programs import TrainPrograms
from top_jax.training.reporting import Reporter, Silence, Throughput
from top_jax.training.run_directory import RunDirectory, flatten
from top_jax.training.start import start_or_resume
from top_jax.training.state import TrainState
from top_jax.training.steps import METRICS
from top_jax.training.teacher import Teacher, load_teacher, read_teacher
from top_jax.training.weights import initial_weights

Summary = dict[str, Any]


def train(config: RunConfig, workdir: str | Path) -> Summary | None:
    """Trains, or goes on training, the run that `config` describes.

    A run that was killed and is started again ends with the numbers of one that never stopped. SIGTERM (and Ctrl-C)
    saves after the step at hand and returns. A loss (or gradient, or weight) that is not finite takes the run back to
    its last checkpoint, from where it goes on without that batch.

    In several processes (`top_jax.distributed`) each calls this with the same config and the same directory, on a file
    system that they share.

    Args:
        config: all of it (`top_jax.config`).
        workdir: the run directory, made if need be.

    Returns:
        What summary.json holds; None where a signal ended the run early.

    Raises:
        InputError: bad input, before anything is written.
        RunError: numbers that are not finite too often, a full disk, checkpoints that are all damaged, or another
            process that failed.
    """
    enable_compilation_cache()
    with contextlib.ExitStack() as held:
        signals = held.enter_context(Interruption())
        with distributed.together():
            run = RunDirectory(workdir)
            distributed.check_same({"workdir": str(run.path), **_shared(config)})
            plan = make_plan(config)
            weights = None if run.has_checkpoints() else initial_weights(config)  # before claiming: may be bad input
            taught_by = load_teacher(run, config)  # as well
            held.enter_context(_full_disk())
            held.enter_context(run.lock())
            run.claim(config)
        teacher = None if config.distillation.teacher is None else read_teacher(run, config, taught_by)
        checkpoints = held.enter_context(Checkpoints(run.checkpoints))
        return _train(plan, run, checkpoints, signals, teacher, weights)


def _train(
    plan: Plan,
    run: RunDirectory,
    checkpoints: Checkpoints,
    signals: Interruption,
    teacher: Teacher | None,
    weights: Weights | None,
) -> Summary | None:
    state, position = start_or_resume(plan, checkpoints, weights)
    first_step = int(state.step)
    with _reporter(run, first_step, plan) as reporter:
        announce(plan, run, reporter, first_step)
        summary = run.read_json("summary.json") if first_step == plan.total_steps else None
        if summary is None:
            loop = Loop(plan, checkpoints, reporter, signals, teacher)
            if not loop.run(state, position):
                kept = checkpoints.latest_step()
                what = "nothing to save yet" if kept is None else f"saved at step {kept}"
                who = signals.requested or "a signal to another process"
                reporter.say(f"{who}: {what}; start the same command again to go on.")
                return None
            summary = loop.summary()
            if distributed.is_primary():
                run.write_json("summary.json", summary)
        conclude(summary, plan, run, reporter)
        return summary


def _shared(config: RunConfig) -> dict[str, Any]:
    """What must be equal in all processes of a run: all but where a host keeps its data and how it reads it."""
    of_the_host = ("data.data_dir", "data.num_workers", "data.num_threads")
    return {key: value for key, value in flatten(config.to_dict()).items() if key not in of_the_host}


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that the devices may still be working on."""

    step: int  # steps done after it
    position: Position
    metrics: dict[str, jax.Array]


class Loop:
    """The steps of one start of a run, with what they share."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Checkpoints,
        reporter: Reporter | Silence,
        signals: Interruption,
        teacher: Teacher | None,
    ):
        self.plan = plan
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.signals = signals
        self.stop = Agreement(signals)
        self.throughput = Throughput()
        self.last_evaluation: dict[str, float | int] = {}
        self.skipped: list[int] = []
        self.train_step = TrainPrograms(plan, teacher)
        self.eval_step = make_eval_step(nnx.graphdef(plan.model), plan.config.data)
        self._dispatched: collections.deque[Dispatched] = collections.deque()

    def run(self, state: TrainState, position: Position) -> bool:
        """Steps until the end (True) or a signal (False); what was reached is saved either way."""
        while True:
            try:
                return self._run(state, position)
            except _NotFinite as error:
                found = error.with_traceback(None)  # or its frames would hold the state while another is read
            state, position = self._roll_back(found)

    def summary(self) -> Summary:
        """The result, for summary.json."""
        config, rates = self.plan.model.config, self.throughput.overall()
        pruned, dense = count_macs(config, self.plan.model.reduction), count_macs(config)
        return {
            "steps": self.plan.total_steps,
            **self.last_evaluation,
            "best_accuracy": self.checkpoints.best_accuracy(),
            "skipped_batches": self.skipped,
            "tokens_per_block": pruned.tokens_per_block,
            "gmacs": {name: pruned.gmacs(name) for name in pruned.macs},
            "dense_gmacs": {name: dense.gmacs(name) for name in dense.macs},
            "train_images_per_second": rates["images_per_second"],
            "data_wait": rates["data_wait"],
            "step_memory": self.train_step.memory(),
            "peak_memory": peak_memory(),
            "device": jax.devices()[0].device_kind,
        }

    def _run(self, state: TrainState, position: Position) -> bool:
        """As `run`, as long as all numbers are finite.

        A step's numbers are read when the next one has been handed to the devices, which so are never idle; before
        anything is evaluated or saved, and at the end, all of them are.
        """
        plan, step = self.plan, int(state.step)
        evaluated = bool(position["evaluated"])  # False where a signal stopped the evaluation of this step
        if not evaluated or step == plan.total_steps:  # the latter: killed between its last checkpoint and its summary
            evaluated = self._evaluate(state, step)
        stop = not evaluated or bool(distributed.any_process(self.signals.requested is not None))
        with plan.train_batches() as batches:
            stream = self._batches(batches, position)
            while step < plan.total_steps and not stop:
                with self.throughput.waiting():
                    batch, position = next(stream)
                if not self.train_step.is_compiled(step):
                    self._settle(leave=0)
                    self.throughput.pause()
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
        """The stream from `position` on, without the batches that are to be left out, and where each leaves it."""
        batches.set_state(position)
        self.skipped = list(position["skipped"])
        for batch, after in prefetch_to_device(batches, self.plan.by_image, self.plan.config.data.prefetch):
            if after["batches"] - 1 not in self.skipped:
                yield batch, {**after, "skipped": self.skipped}

    def _settle(self, leave: int) -> None:
        """Looks at the numbers of all dispatched steps but the last `leave`."""
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
        shown = {name: values[name] for name in ("loss", "accuracy")}
        self.reporter.step(step, {**shown, **self.throughput.overall()})

    def _roll_back(self, found: _NotFinite) -> tuple[TrainState, Position]:
        """The last good state, from which the run goes on without the batch that broke it.

        Raises:
            RunError: it has happened `max_rollbacks` times already.
        """
        self._dispatched.clear()
        skipped, limit = sorted({*self.skipped, found.batch}), self.plan.config.max_rollbacks
        kept = self.checkpoints.latest_step()
        if len(skipped) > limit:
            raise RunError(
                f"{found}, with {limit} batches left out for the like already (max_rollbacks); "
                + ("nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept")
                + ". Lower optimizer.learning_rate, or set optimizer.clip_norm."
            )
        self.throughput.pause()
        state, position = start_or_resume(self.plan, self.checkpoints, None)
        step = int(state.step)
        self.reporter.say(
            f"{found}: back to step {step}, and on without batch {found.batch} "
            f"({len(skipped)} left out so far, {limit} at most)"
        )
        self.reporter.rewind(step)
        return state, {**position, "skipped": skipped}

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Evaluates the weights, and their average where one is kept; the average then decides what is best.

        Returns:
            Whether it came to its end, rather than to a signal.
        """
        self.throughput.pause()
        plan, evaluation = self.plan, {}
        for name, weights in state.weights().items():
            with self.reporter.evaluating(len(plan.eval_source)) as advance:
                result = self._evaluate_weights(weights, advance)
            if result is None:
                return False
            prefix = "" if name == "params" else f"{name}_"
            evaluation |= {f"{prefix}{key}": value for key, value in result.items()}
        self.last_evaluation = evaluation
        self.reporter.metrics("eval", step, evaluation)
        self.checkpoints.save_if_best(state, evaluation.get("ema_accuracy", evaluation["accuracy"]))
        self.throughput.resume()
        return True

    def _evaluate_weights(self, weights: Weights, advance: Callable[[int], None]) -> dict[str, float | int] | None:
        def on_batch(images: int) -> None:
            if distributed.any_process(self.signals.requested is not None):
                raise _Stopped
            advance(images)

        plan = self.plan
        try:
            return evaluate(
                self.eval_step,
                weights,
                plan.eval_batches(),
                plan.by_image,
                prefetch=plan.config.data.prefetch,
                on_batch=on_batch,
            )
        except _Stopped:
            return None

    def _save(self, state: TrainState, position: Position, evaluated: bool) -> None:
        self.throughput.pause()
        self.checkpoints.save(state, {**position, "evaluated": int(evaluated)})
        self.throughput.resume()


class _Stopped(Exception):
    """A signal came during an evaluation."""


class _NotFinite(Exception):
    """A number that is not finite came out of a step."""

    def __init__(self, name: str, value: float, step: int, batch: int):
        super().__init__(f"the {name} of step {step} is {value}")
        self.batch = batch  # its number in the stream


def _reporter(run: RunDirectory, first_step: int, plan: Plan) -> Reporter | Silence:
    if not distributed.is_primary():
        return Silence()
    return Reporter(run, first_step=first_step, total_steps=plan.total_steps)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """Turns a full disk, however it is reported, into one clear line."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise RunError(
                "the disk is full: what was to be written now is not, the last whole checkpoint is kept. "
                "Make room and start the same command again."
            ) from error
        raise
