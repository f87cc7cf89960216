"""The programs that are timed of a model, inference and a train step: their inputs, their memory, and their speed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax.benchmark.timing import Rounds, Row, Run, Timing, compile_all, one_line, over_sets, time_in_turn
from top_jax.evaluation.flops import count_macs
from top_jax.memory import peak_memory, program_memory
from top_jax.models import Backbone, BackboneConfig, abstract_model
from top_jax.models.weights import Weights, join_weights, split_weights, statistics_of, weights_of
from top_jax.pruning import Reduction

INFERENCE: Final = "inference"
TRAIN_STEP: Final = "train step"
BOTH_PASSES: Final = (INFERENCE, TRAIN_STEP)
OPTIMIZER: Final = optax.adamw(1e-4)

Batch = tuple[jax.Array, jax.Array]  # images float32 [B, H, W, 3] and labels int32 [B]
Compiled = tuple[Any, float]  # a program and the seconds of tracing and compiling it


class ModelCase(NamedTuple):
    """A model to be timed, dense and pruned.

    Attributes:
        name: of `create_model`.
        pruning: of the pruned model.
        batch: images per call.
        dtype: of the matrix products.
        implementation: of the scan; None is the model's own choice.
        overrides: of the named model's sizes.
    """

    name: str
    pruning: Reduction
    batch: int
    dtype: str = "bfloat16"
    implementation: str | None = None
    overrides: dict[str, Any] | None = None


def time_model(
    case: ModelCase, rounds: Rounds, *, passes: tuple[str, ...] = BOTH_PASSES, workers: int = 4
) -> list[Row]:
    """Times the dense and the pruned model in turn.

    Args:
        case: the model.
        rounds: of the timing.
        passes: `INFERENCE`, `TRAIN_STEP` or both. A train step is forward in train mode, cross entropy, backward and
            AdamW.
        workers: programs compiled at a time.

    Returns:
        A row for each pass and variant. `compile_s` is the time of tracing and compiling, `program_mib` what XLA
        reserves for the program, arguments and results included.
    """
    overrides = {**(case.overrides or {}), "dtype": case.dtype}
    if case.implementation is not None:
        overrides["implementation"] = case.implementation
    models = {
        name: abstract_model(case.name, pruning=pruning, **overrides)
        for name, pruning in (("dense", None), ("pruned", case.pruning))
    }
    weights = random_weights(models["dense"])  # pruning adds no parameters
    sets = make_batches(models["dense"].config, case.batch)
    lower = {
        (name, which): lowering(model, which, weights, sets[0]) for name, model in models.items() for which in passes
    }
    compiled = compile_all(lower, workers)
    rows = []
    for which in passes:  # one after the other, so that a train step's memory is free while inference is timed
        entries = [Entry(name, model, weights, compiled[name, which]) for name, model in models.items()]
        timed = time_entries(entries, which, sets, rounds)
        for entry in entries:
            cost = count_macs(entry.model.config, entry.model.reduction)
            start: Row = {
                "model": case.name, "variant": entry.name, "pass": which, "dtype": case.dtype, "batch": case.batch,
                "implementation": entry.model.scan_implementation,
                "gmacs_published": round(cost.gmacs("published"), 6),
            }  # fmt: skip
            rows.append(start | speed_row(entry, timed[entry.name], case.batch))
    return rows


class Entry(NamedTuple):
    """A compiled program of a model, to be timed.

    Attributes:
        name: unique among those timed together.
        model: without weights.
        weights: to run with; they are not changed.
        compiled: what `compile_all` returned for it.
    """

    name: str
    model: Backbone
    weights: Weights
    compiled: Compiled | Exception


def time_entries(
    entries: list[Entry],
    which: str,
    sets: list[Batch],
    rounds: Rounds,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing | Exception]:
    """Times compiled programs in turn.

    Args:
        entries: the programs; one that was not compiled is left out.
        which: `INFERENCE` or `TRAIN_STEP`.
        sets: batches that the calls rotate through.
        rounds: of the timing.
        on_round: called after each round.

    Returns:
        By name the timing, or the exception that compiling or running raised.
    """
    runs = {
        entry.name: _run_of(entry, entry.compiled[0], which, sets)
        for entry in entries
        if not isinstance(entry.compiled, Exception)
    }
    refused = {entry.name: entry.compiled for entry in entries if isinstance(entry.compiled, Exception)}
    return {**refused, **time_in_turn(runs, rounds, on_round)}


def speed_row(entry: Entry, result: Timing | Exception, batch: int) -> Row:
    """Returns speed, compile time and memory of a timed program, or its `error`, for a report."""
    if isinstance(result, Exception):
        return {"error": one_line(result)}
    program, seconds = cast("Compiled", entry.compiled)
    return {**result.rates(batch), **result.row(), "compile_s": round(seconds, 1), **_memory_row(program)}


def lowering(model: Backbone, which: str, weights: Weights, batch: tuple[Any, Any]) -> Callable[[], Any]:
    """Returns a function that traces inference or a train step, for `compile_all`.

    Args:
        model: without weights.
        which: `INFERENCE` or `TRAIN_STEP`.
        weights: arrays or their shapes, as `batch`.
        batch: images and labels.
    """
    if which == INFERENCE:
        return functools.partial(jax.jit(make_inference(nnx.graphdef(model))).lower, weights, batch[0])
    step = jax.jit(make_train_step(model, OPTIMIZER), donate_argnums=(0, 1))
    params, _ = split_weights(weights, statistics_of(model))
    return functools.partial(step.lower, weights, jax.eval_shape(OPTIMIZER.init, params), *batch)


def make_inference(graphdef: Any) -> Callable[[Weights, jax.Array], jax.Array]:
    """Returns a function of weights and images that returns logits."""
    return lambda weights, images: nnx.merge(graphdef, weights)(images)


def make_train_step(model: Backbone, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns a train step: (weights, state, images, labels) -> (weights, state, loss).

    The optimizer's state is that of the parameters, without BatchNorm's statistics.
    """
    graphdef, like = nnx.graphdef(model), statistics_of(model)

    def loss_of(params: Weights, stats: Weights, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Weights]:
        model = nnx.merge(graphdef, params, stats)
        model.train()
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(images), labels))
        return loss, statistics_of(model)

    def step(weights: Weights, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        params, stats = split_weights(weights, like)
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        params = cast("Weights", optax.apply_updates(params, updates))
        return join_weights(params, stats), state, loss

    return step


def random_weights(model: Backbone, seed: int = 0) -> Weights:
    """Draws weights for timing, with NumPy, because compiling a model's own initialisers takes longer than the model.

    Matrices are normal and keep a signal's variance, vectors (biases, scales, variances) are uniform in 0.5 .. 1,
    counts are 0. So all values stay finite, and none is a denormal number, which would slow a CPU down.

    Args:
        model: shapes are enough (`nnx.eval_shape`).
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32) / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, weights_of(model))


def make_batches(config: BackboneConfig, batch: int) -> list[Batch]:
    """Draws two batches of random images, float32 `[B, H, W, 3]`, and labels, int32 `[B]`."""
    shape = (batch, *config.img_size, 3)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    return [(jax.random.normal(key, shape), jax.random.randint(key, shape[:1], 0, config.num_classes)) for key in keys]


def _run_of(entry: Entry, program: Any, which: str, sets: list[Batch]) -> Run:
    if which == INFERENCE:
        return over_sets(program, [(entry.weights, images) for images, _ in sets])
    return _TrainSteps(program, entry, sets)


class _TrainSteps:
    """A train step that keeps its state from call to call and reuses its buffers, as in training."""

    def __init__(self, program: Callable[..., Any], entry: Entry, sets: list[Batch]):
        self._program, self._sets = program, sets
        self._weights = jax.tree.map(jnp.copy, entry.weights)  # they are donated, and others need them
        self._state = OPTIMIZER.init(split_weights(self._weights, statistics_of(entry.model))[0])

    def __call__(self, number: int) -> jax.Array:
        """Runs one step and returns its loss."""
        batch = self._sets[number % len(self._sets)]
        self._weights, self._state, loss = self._program(self._weights, self._state, *batch)
        return loss


def _memory_row(program: Any) -> Row:
    """Returns MiB of a program, and the most that this process has had on the device, where these are known."""
    row: Row = {}
    if planned := program_memory(program):
        row["program_mib"] = round(planned["total"] / 2**20, 2)
    peak = peak_memory()
    if peak is not None and peak["of"] == "device":
        row["process_peak_mib"] = round(int(peak["bytes"]) / 2**20, 1)
    return row
