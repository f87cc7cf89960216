"""Whole models on this device: images per second, memory and compile time; dense and pruned timed in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from top_jax.benchmark.programs import (
    LEARNING_RATE,
    PASSES,
    TrainSteps,
    make_batches,
    make_inference,
    make_train_step,
    memory_row,
    random_weights,
)
from top_jax.benchmark.timing import Rounds, Row, compile_all, over_sets, time_in_turn, told
from top_jax.evaluation.flops import count_macs
from top_jax.models import Backbone, create_model
from top_jax.models.weights import Weights, split_weights, statistics_of
from top_jax.pruning import Reduction


class ModelCase(NamedTuple):
    """A model to be timed, dense and pruned.

    Attributes:
        name: of `create_model`.
        pruning: of the pruned one.
        batch: images.
        dtype: of the matrix products.
        implementation: of the scan; None is the model's own choice.
        overrides: sizes other than the named model's.
    """

    name: str
    pruning: Reduction
    batch: int
    dtype: str = "bfloat16"
    implementation: str | None = None
    overrides: dict[str, Any] | None = None


def time_model(case: ModelCase, rounds: Rounds, *, passes: tuple[str, ...] = PASSES, workers: int = 4) -> list[Row]:
    """A row for each pass of the dense and of the pruned model.

    The weights are an argument of the program, and as random as the images. A train step is forward in
    train mode, cross entropy, backward and AdamW. `compile_s` is tracing and compiling, `workers` programs at a time;
    `program_mib` what XLA reserves for the program, arguments and results included.
    """
    build = functools.partial(create_model, case.name, dtype=case.dtype, **(case.overrides or {}))
    if case.implementation is not None:
        build = functools.partial(build, implementation=case.implementation)
    variants = {"dense": None, "pruned": case.pruning}
    models: dict[str, Backbone] = {
        name: nnx.eval_shape(functools.partial(build, pruning=p)) for name, p in variants.items()
    }
    weights = random_weights(models["dense"])  # pruning adds no parameters
    sets = make_batches(models["dense"].config, case.batch)
    optimizer = optax.adamw(LEARNING_RATE)
    params, _ = split_weights(weights, like=statistics_of(models["dense"]))
    state = jax.jit(optimizer.init)(params) if PASSES[1] in passes else None
    lower = {}
    for name, model in models.items():
        inference, training = make_inference(nnx.graphdef(model)), make_train_step(model, optimizer)
        if PASSES[0] in passes:
            lower[name, PASSES[0]] = functools.partial(jax.jit(inference).lower, weights, sets[0][0])
        if PASSES[1] in passes:
            step = jax.jit(training, donate_argnums=(0, 1))
            lower[name, PASSES[1]] = functools.partial(step.lower, weights, state, *sets[0])
    compiled = compile_all(lower, workers)
    rows = []
    for which in passes:  # one after the other, so that training's memory is not there while inference is timed
        programs = {name: compiled[name, which] for name in models}
        rows += _time_pass(case, which, models, programs, weights, state, sets, rounds)
    return rows


def _time_pass(
    case: ModelCase,
    which: str,
    models: dict[str, Backbone],
    programs: dict[str, Any],
    weights: Weights,
    state: Any,
    sets: list[tuple[jax.Array, jax.Array]],
    rounds: Rounds,
) -> list[Row]:
    runs: dict[str, Callable[[int], Any]] = {}
    for name, found in programs.items():
        if isinstance(found, Exception):
            continue
        if which == PASSES[0]:
            runs[name] = over_sets(found[0], [(weights, images) for images, _ in sets])
        else:
            runs[name] = TrainSteps(found[0], weights, state, sets)
    results: dict[str, Any] = time_in_turn(runs, rounds)
    rows = []
    for name, model in models.items():
        cost = count_macs(model.config, model.reduction)
        row: Row = {
            "model": case.name, "variant": name, "pass": which, "dtype": case.dtype, "batch": case.batch,
            "implementation": model.scan_implementation,
            "gmacs_published": round(cost.gmacs("published"), 6),
        }  # fmt: skip
        result = results.get(name, programs[name])
        if isinstance(result, Exception):
            rows.append({**row, "error": told(result)})
            continue
        speed = result.rates(case.batch)
        rows.append(
            {**row, **speed, **result.row(), "compile_s": round(programs[name][1], 1), **memory_row(programs[name][0])}
        )
    return rows
