"""The training loop: set up, restore, step, evaluate, save, and say how it went."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from top_jax.config import RunConfig
from top_jax.data import Source, eval_batches, open_source, prefetch_to_device, train_batches
from top_jax.errors import InputError, RunError
from top_jax.evaluation.accuracy import evaluate, make_eval_step
from top_jax.evaluation.flops import count_macs
from top_jax.models import Vim, abstract_model
from top_jax.sharding import check_divisible, data_parallel
from top_jax.training.checkpoints import Checkpoints, abstract_params, make_pruning
from top_jax.training.compilation_cache import enable_compilation_cache
from top_jax.training.interruption import Interruption
from top_jax.training.optimizer import learning_rate_schedule, make_optimizer
from top_jax.training.reporting import Reporter, Throughput
from top_jax.training.run_directory import RunDirectory
from top_jax.training.state import Params, TrainState, create_state
from top_jax.training.steps import make_train_step
from top_jax.training.weights import initial_params

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, ready to start: everything that bad input could stop has been looked at, and nothing written."""

    config: RunConfig
    model: Vim  # shapes only, in eval mode
    train_source: Source
    eval_source: Source
    eval_batch_size: int
    total_steps: int
    eval_every: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    by_image: NamedSharding  # batch axis over all devices
    replicated: NamedSharding


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
    plan = make_plan(config)
    run = RunDirectory(workdir)
    params = None if run.has_checkpoints() else initial_params(config)  # before claiming: it may be bad input
    run.claim(config)
    with Checkpoints(run.checkpoints) as checkpoints:
        state, data_state = _start_or_resume(plan, checkpoints, params)
        first_step = int(state.step)
        with Reporter(run, first_step=first_step, total_steps=plan.total_steps) as reporter, Interruption() as signals:
            _announce(plan, run, reporter, first_step)
            loop = Loop(plan, checkpoints, reporter, signals)
            finished = loop.run(state, data_state)
            if not finished:
                reporter.say(f"{signals.requested}: saved; start the same command again to go on.")
                return None
            summary = loop.summary()
            run.write_json("summary.json", summary)
            _conclude(summary, run, reporter)
            return summary


def make_plan(config: RunConfig) -> Plan:
    """Checks everything about a run before it starts; see `Plan`.

    Raises:
        InputError: anything that does not fit.
    """
    model = abstract_model(config.model.name, pruning=make_pruning(config.pruning), **config.model.overrides())
    train_source, eval_source = (open_source(config.data, train=train) for train in (True, False))
    for source in (train_source, eval_source):
        if source.num_classes != config.model.num_classes:
            raise InputError(
                f"{source.name} has {source.num_classes} classes and the model {config.model.num_classes}; "
                f"set --config.model.num_classes={source.num_classes}."
            )
    eval_batch_size = config.eval_batch_size or config.batch_size
    check_divisible("batch_size", config.batch_size, config.optimizer.accumulate)
    check_divisible("eval_batch_size", eval_batch_size)
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = config.total_steps or max(1, round(config.epochs * steps_per_epoch))
    schedule = learning_rate_schedule(
        config.optimizer, batch_size=config.batch_size, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    by_image, replicated = data_parallel()
    return Plan(
        config=config,
        model=model,
        train_source=train_source,
        eval_source=eval_source,
        eval_batch_size=eval_batch_size,
        total_steps=total_steps,
        eval_every=max(1, round(config.eval_every_epochs * steps_per_epoch)),
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, schedule),
        by_image=by_image,
        replicated=replicated,
    )


class Loop:
    """The steps of one start of a run, with what they share."""

    def __init__(self, plan: Plan, checkpoints: Checkpoints, reporter: Reporter, signals: Interruption):
        self.plan = plan
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.signals = signals
        self.throughput = Throughput()
        self.last_evaluation: dict[str, float] = {}
        self.train_step = _jit_train_step(plan)
        self.eval_step = make_eval_step(nnx.graphdef(plan.model), plan.config.data)

    def run(self, state: TrainState, data_state: dict[str, int]) -> bool:
        """Steps until the end (True) or a signal (False); what was reached is saved either way."""
        plan, config, step = self.plan, self.plan.config, int(state.step)
        batches = train_batches(
            plan.train_source,
            config.data,
            img_size=plan.model.config.img_size,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        with batches:
            batches.set_state(data_state)
            stream = prefetch_to_device(batches, plan.by_image, config.data.prefetch)
            while step < plan.total_steps and not self.signals.requested:
                batch, data_state = next(stream)
                state, metrics = self.train_step(state, batch)
                step += 1
                self._after_step(step, metrics)
                if step % plan.eval_every == 0 or step == plan.total_steps:
                    self._evaluate(state, step)
                    self._save(state, data_state)
                elif step % config.checkpoint_every == 0:
                    self._save(state, data_state)
        if not self.last_evaluation and step == plan.total_steps:  # it was finished before this start
            self._evaluate(state, step)
        if step > 0:
            self._save(state, data_state)
            _or_disk_full(self.checkpoints.wait)
        return step == plan.total_steps

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
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            kept = self.checkpoints.latest_step()
            raise RunError(
                f"the loss of step {step} is {loss}; "
                + (f"the checkpoint of step {kept} is kept" if kept else "nothing was saved yet")
                + ". Lower optimizer.learning_rate, or set optimizer.clip_norm."
            )
        self.throughput.add(self.plan.config.batch_size)
        self.reporter.step(step)
        if step % self.plan.config.log_every == 0 or step == self.plan.total_steps:
            values = {name: float(value) for name, value in metrics.items()}
            values["learning_rate"] = float(np.asarray(self.plan.schedule(step - 1)))
            self.reporter.metrics("train", step, {**values, "images_per_second": self.throughput.recent()})

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates the weights, and their average where one is kept; the average then decides what is best."""
        self.throughput.pause()
        plan = self.plan
        self.last_evaluation = {}
        for name, params in state.weights().items():
            batches = eval_batches(
                plan.eval_source, plan.config.data, img_size=plan.model.config.img_size, batch_size=plan.eval_batch_size
            )
            result = evaluate(self.eval_step, params, batches, plan.by_image, prefetch=plan.config.data.prefetch)
            prefix = "" if name == "params" else f"{name}_"
            self.last_evaluation |= {f"{prefix}{key}": value for key, value in result.items()}
        self.reporter.metrics("eval", step, self.last_evaluation)
        accuracy = self.last_evaluation.get("ema_accuracy", self.last_evaluation["accuracy"])
        _or_disk_full(lambda: self.checkpoints.save_if_best(state, accuracy))
        self.throughput.resume()

    def _save(self, state: TrainState, data_state: dict[str, int]) -> None:
        self.throughput.pause()
        _or_disk_full(lambda: self.checkpoints.save(state, data_state))
        self.throughput.resume()


def _start_or_resume(plan: Plan, checkpoints: Checkpoints, params: Params | None) -> tuple[TrainState, dict[str, int]]:
    """The newest checkpoint, or a fresh state from `params` (made here where they are not given)."""
    config = plan.config

    def create(params: Params) -> TrainState:
        with_ema = config.optimizer.ema_decay is not None
        return create_state(params, plan.optimizer, seed=config.seed, with_ema=with_ema)

    shapes = jax.eval_shape(create, abstract_params(config.model))
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=plan.replicated)  # noqa: E731
    if restored := checkpoints.restore(jax.tree.map(place, shapes)):
        return restored
    return jax.device_put(create(params or initial_params(config)), plan.replicated), {"batches": 0}


def _jit_train_step(plan: Plan) -> Callable[..., Any]:
    config = plan.config
    model = nnx.clone(plan.model)
    model.train()
    step = make_train_step(nnx.graphdef(model), plan.optimizer, config.optimizer, config.data)
    return jax.jit(step, donate_argnums=0, out_shardings=(plan.replicated, plan.replicated))


def _or_disk_full(save: Callable[[], None]) -> None:
    """Turns a full disk, however it is reported, into one clear line."""
    try:
        save()
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise RunError(
                "the disk is full: this checkpoint was not written, the last one is kept. "
                "Make room and start the same command again."
            ) from error
        raise


def _announce(plan: Plan, run: RunDirectory, reporter: Reporter, first_step: int) -> None:
    config = plan.config
    start = f"going on after step {first_step}" if first_step else "starting"
    reporter.say(
        f"{run.path}: {start}; {plan.total_steps} steps of {config.batch_size} images on {len(jax.devices())} x "
        f"{jax.devices()[0].device_kind}; {config.model.name}, {plan.train_source.name} ({len(plan.train_source)} "
        f"images to train, {len(plan.eval_source)} to evaluate)"
    )
    if plan.model.pruning.after_blocks and config.init_from is None and not first_step:
        reporter.say(
            "no init_from: the pruned model starts from random weights. The paper fine-tunes dense ones: "
            "--config.init_from=RUN_DIRECTORY or an official .pth"
        )


def _conclude(summary: Summary, run: RunDirectory, reporter: Reporter) -> None:
    stages = " -> ".join(str(n) for n in dict.fromkeys(summary["tokens_per_block"]))
    costs = ", ".join(
        f"{cost:.3g} of {summary['dense_gmacs'][name]:.3g} ({cost / summary['dense_gmacs'][name]:.1%}, {name})"
        for name, cost in summary["gmacs"].items()
    )
    average = f", averaged weights {summary['ema_accuracy']:.2%}" if "ema_accuracy" in summary else ""
    reporter.say(
        f"accuracy {summary['accuracy']:.2%}{average}, best {summary['best_accuracy']:.2%}; {summary['images']} images"
    )
    reporter.say(f"tokens per stage {stages} (class token included); GMACs {costs}")
    reporter.say(
        f"{summary['train_images_per_second']:.1f} img/s training, {summary['images_per_second']:.1f} img/s evaluation "
        f"on {summary['device']}; everything is in {run.path}"
    )
