"""Whole models on this device: images per second, memory and compile time; dense and pruned timed in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.benchmark.timing import Rounds, Row, compile_all, over_sets, time_in_turn, told
from top_jax.evaluation.flops import count_macs
from top_jax.models import Backbone, create_model
from top_jax.models.weights import Weights, join_weights, split_weights, statistics_of, weights_of
from top_jax.ops import implementations
from top_jax.pruning import Reduction

PASSES: Final = ("inference", "train step")
_LEARNING_RATE: Final = 1e-4


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


class _Training:
    """A train step that carries its state from call to call, so that its buffers can be reused, as in training."""

    def __init__(self, step: Callable[..., Any], weights: Weights, state: Any, sets: list[tuple[jax.Array, jax.Array]]):
        self.step = step
        self.weights, self.state = jax.tree.map(
            jnp.copy, (weights, state)
        )  # they are donated: others need the originals
        self.sets = sets

    def __call__(self, number: int) -> jax.Array:
        self.weights, self.state, loss = self.step(self.weights, self.state, *self.sets[number % len(self.sets)])
        return loss


def time_model(case: ModelCase, rounds: Rounds, *, passes: tuple[str, ...] = PASSES, workers: int = 4) -> list[Row]:
    """A row for each pass of the dense and of the pruned model.

    The weights are those of a new model and an argument of the program, the images random. A train step is forward in
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
    weights = jax.jit(lambda: weights_of(build()))()  # pruning adds no parameters
    sets = _batches(case, models["dense"])
    optimizer = optax.adamw(_LEARNING_RATE)
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


def make_inference(graphdef: Any) -> Callable[[Weights, jax.Array], jax.Array]:
    """Logits of images, as a function of the weights."""
    return lambda weights, images: nnx.merge(graphdef, weights)(images)


def make_train_step(model: Backbone, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """(weights, optimizer state, loss) after one batch of images and labels; the optimizer's state is of parameters."""
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


def _batches(case: ModelCase, model: Backbone) -> list[tuple[jax.Array, jax.Array]]:
    shape = (case.batch, *model.config.img_size, 3)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    return [
        (jax.random.normal(key, shape), jax.random.randint(key, shape[:1], 0, model.config.num_classes)) for key in keys
    ]


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
            runs[name] = _Training(found[0], weights, state, sets)
    results: dict[str, Any] = time_in_turn(runs, rounds)
    rows = []
    for name, model in models.items():
        cost = count_macs(model.config, model.pruning)
        row: Row = {
            "model": case.name, "variant": name, "pass": which, "dtype": case.dtype, "batch": case.batch,
            "implementation": model.scan_implementation,
            "gmacs_published": round(cost.gmacs("published"), 6),
        }  # fmt: skip
        result = results.get(name, programs[name])
        if isinstance(result, Exception):
            rows.append({**row, "error": told(result)})
            continue
        quartiles = [round(case.batch / result.high, 2), round(case.batch / result.low, 2)]
        speed = {"images_per_s": round(case.batch / result.median, 2), "images_per_s_quartiles": quartiles}
        rows.append(
            {**row, **speed, **result.row(), "compile_s": round(programs[name][1], 1), **_memory(programs[name][0])}
        )
    return rows


def _memory(program: Any) -> Row:
    """MiB of a program, and the most this process has ever had on the device, where the backend tells."""
    row: Row = {}
    sizes = program.memory_analysis()
    if sizes is not None:
        whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        row["program_mib"] = round((whole - sizes.alias_size_in_bytes) / 2**20, 2)
    stats = implementations.device().memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        row["process_peak_mib"] = round(stats["peak_bytes_in_use"] / 2**20, 1)
    return row
