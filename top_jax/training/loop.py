"""The training loop: set up, restore, step, evaluate, save, and say how it went."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from top_jax.config import RunConfig
from top_jax.data import prefetch_to_device
from top_jax.errors import RunError
from top_jax.evaluation.accuracy import evaluate, make_eval_step
from top_jax.evaluation.flops import count_macs
from top_jax.models.weights import Weights, split_weights, statistics_of
from top_jax.training.checkpoints import Checkpoints, abstract_weights
from top_jax.training.compilation_cache import enable_compilation_cache
from top_jax.training.interruption import Interruption
from top_jax.training.plan import Plan, make_plan
from top_jax.training.reporting import Reporter, Throughput
from top_jax.training.run_directory import RunDirectory
from top_jax.training.state import TrainState, create_state
from top_jax.training.steps import METRICS, make_train_step
from top_jax.training.weights import initial_weights

Summary = dict[str, Any]


def train(config: RunConfig, workdir: str | Path) -> Summary | None:
    """Trains, or goes on training, the run that `config` describes.

    A run that was killed and is started again ends with the numbers of one that never stopped. SIGTERM (and Ctrl-C)
    saves after the current step and returns.

    Args:
        config: all of it (`top_jax.config`).
        workdir: the run directory, made if need be.

    Returns:
        What summary.json holds; None where a signal ended the run early.

    Raises:
        InputError: bad input, before anything is written.
        RunError: the loss is not finite, or the disk is full.
    """
    enable_compilation_cache()
    with Interruption() as signals:
        plan = make_plan(config)
        run = RunDirectory(workdir)
        weights = None if run.has_checkpoints() else initial_weights(config)  # before claiming: it may be bad input
        with run.lock(), _full_disk():
            run.claim(config)
            with Checkpoints(run.checkpoints) as checkpoints:
                return _train(plan, run, checkpoints, signals, weights)


def _train(
    plan: Plan, run: RunDirectory, checkpoints: Checkpoints, signals: Interruption, weights: Weights | None
) -> Summary | None:
    state, data_state = _start_or_resume(plan, checkpoints, weights)
    first_step = int(state.step)
    with Reporter(run, first_step=first_step, total_steps=plan.total_steps) as reporter:
        _announce(plan, run, reporter, first_step)
        summary = run.read_json("summary.json") if first_step == plan.total_steps else None
        if summary is None:
            loop = Loop(plan, checkpoints, reporter, signals)
            if not loop.run(state, data_state):
                kept = checkpoints.latest_step()
                what = "nothing to save yet" if kept is None else f"saved at step {kept}"
                reporter.say(f"{signals.requested}: {what}; start the same command again to go on.")
                return None
            summary = loop.summary()
            run.write_json("summary.json", summary)
        _conclude(summary, plan, run, reporter)
        return summary


class Loop:
    """The steps of one start of a run, with what they share."""

    def __init__(self, plan: Plan, checkpoints: Checkpoints, reporter: Reporter, signals: Interruption):
        self.plan = plan
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.signals = signals
        self.throughput = Throughput()
        self.last_evaluation: dict[str, float | int] = {}
        self.train_step = _jit_train_step(plan)
        self.eval_step = make_eval_step(nnx.graphdef(plan.model), plan.config.data)

    def run(self, state: TrainState, data_state: dict[str, int]) -> bool:
        """Steps until the end (True) or a signal (False); what was reached is saved either way."""
        plan, step = self.plan, int(state.step)
        evaluated = bool(data_state.get("evaluated", True))  # False where a signal stopped the evaluation of this step
        if not evaluated or step == plan.total_steps:  # the latter: killed between its last checkpoint and its summary
            evaluated = self._evaluate(state, step)
        with plan.train_batches() as batches:
            batches.set_state(data_state)
            stream = prefetch_to_device(batches, plan.by_image, plan.config.data.prefetch)
            while step < plan.total_steps and not self.signals.requested:
                batch, data_state = next(stream)
                state, metrics = self.train_step(state, batch)
                step += 1
                self._after_step(step, metrics)
                if due := step % plan.eval_every == 0 or step == plan.total_steps:
                    evaluated = self._evaluate(state, step)
                if due or step % plan.config.checkpoint_every == 0:
                    self._save(state, data_state, evaluated)
        if step > 0:
            self._save(state, data_state, evaluated)
            self.checkpoints.wait()
        return step == plan.total_steps and evaluated

    def summary(self) -> Summary:
        """The result, for summary.json."""
        config = self.plan.model.config
        pruned, dense = count_macs(config, self.plan.model.pruning), count_macs(config)
        return {
            "steps": self.plan.total_steps,
            **self.last_evaluation,
            "best_accuracy": self.checkpoints.best_accuracy(),
            "tokens_per_block": pruned.tokens_per_block,
            "gmacs": {name: pruned.gmacs(name) for name in pruned.macs},
            "dense_gmacs": {name: dense.gmacs(name) for name in dense.macs},
            "train_images_per_second": self.throughput.overall(),
            "device": jax.devices()[0].device_kind,
        }

    def _after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(metrics[name]) for name in METRICS if name in metrics}
        for name, value in values.items():
            if not math.isfinite(value):
                kept = self.checkpoints.latest_step()
                raise RunError(
                    f"the {name} of step {step} is {value}; "
                    + ("nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept")
                    + ". Lower optimizer.learning_rate, or set optimizer.clip_norm."
                )
        self.throughput.add(self.plan.config.batch_size)
        if step % self.plan.config.log_every == 0 or step == self.plan.total_steps:
            self.throughput.pause()
            values["learning_rate"] = float(np.asarray(self.plan.schedule(step - 1)))
            self.reporter.metrics("train", step, {**values, "images_per_second": self.throughput.recent()})
            self.throughput.resume()
        shown = {name: values[name] for name in ("loss", "accuracy")}
        self.reporter.step(step, {**shown, "images_per_second": self.throughput.overall()})

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
            if self.signals.requested:
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

    def _save(self, state: TrainState, data_state: dict[str, int], evaluated: bool) -> None:
        self.throughput.pause()
        self.checkpoints.save(state, {**data_state, "evaluated": int(evaluated)})
        self.throughput.resume()


class _Stopped(Exception):
    """A signal came during an evaluation."""


def _start_or_resume(
    plan: Plan, checkpoints: Checkpoints, weights: Weights | None
) -> tuple[TrainState, dict[str, int]]:
    """The newest checkpoint, or a fresh state from `weights` (made here where they are not given)."""
    config = plan.config

    def create(weights: Weights) -> TrainState:
        params, stats = split_weights(weights, like=statistics_of(plan.model))
        with_ema = config.optimizer.ema_decay is not None
        return create_state(params, stats, plan.optimizer, seed=config.seed, with_ema=with_ema)

    shapes = jax.eval_shape(create, abstract_weights(config.model))
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=plan.replicated)  # noqa: E731
    if restored := checkpoints.restore(jax.tree.map(place, shapes)):
        return restored
    return jax.device_put(create(weights or initial_weights(config)), plan.replicated), {"batches": 0}


def _jit_train_step(plan: Plan) -> Callable[..., Any]:
    step = make_train_step(nnx.graphdef(plan.model), plan.optimizer, plan.config)
    return jax.jit(step, donate_argnums=0, out_shardings=(plan.replicated, plan.replicated))


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


def _announce(plan: Plan, run: RunDirectory, reporter: Reporter, first_step: int) -> None:
    config = plan.config
    start = f"going on after step {first_step}" if first_step else "starting"
    scan = "" if plan.scan is None else f", {plan.scan} scan"
    reporter.say(
        f"{run.path}: {start}; {plan.total_steps} steps of {config.batch_size} images on {len(jax.devices())} x "
        f"{jax.devices()[0].device_kind}; {config.model.name}{scan}; "
        f"{plan.train_source.name} ({len(plan.train_source)} images to train, {len(plan.eval_source)} to evaluate)"
    )
    if plan.model.pruning.after_blocks and config.init_from is None and not first_step:
        reporter.say(
            "no init_from: the pruned model starts from random weights. The paper fine-tunes dense ones: "
            "--config.init_from=RUN_DIRECTORY or an official file (.pth, .safetensors)"
        )


def _conclude(summary: Summary, plan: Plan, run: RunDirectory, reporter: Reporter) -> None:
    stages = " -> ".join(str(n) for n in dict.fromkeys(summary["tokens_per_block"]))
    has_class_token = summary["tokens_per_block"][0] > plan.model.config.num_patches
    costs = ", ".join(
        f"{cost:.3g} of {summary['dense_gmacs'][name]:.3g} ({cost / summary['dense_gmacs'][name]:.1%}, {name})"
        for name, cost in summary["gmacs"].items()
    )
    average = f", averaged weights {summary['ema_accuracy']:.2%}" if "ema_accuracy" in summary else ""
    reporter.say(
        f"accuracy {summary['accuracy']:.2%}{average}, best {summary['best_accuracy']:.2%}; {summary['images']} images"
    )
    reporter.say(f"tokens per stage {stages}{' (class token included)' * has_class_token}; GMACs {costs}")
    reporter.say(
        f"{summary['train_images_per_second']:.1f} img/s training, {summary['images_per_second']:.1f} img/s evaluation "
        f"on {summary['device']}; everything is in {run.path}"
    )
