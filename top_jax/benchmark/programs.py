"""Compiled programs of a model, inference and a train step: their inputs, memory and speed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax.benchmark.timing import Program, Rounds, Row, Run, Timing, compile_all, one_line, over_sets, time_in_turn
from top_jax.build import Model, backbone_of
from top_jax.config import OptimizerConfig
from top_jax.evaluation.flops import count_macs
from top_jax.memory import peak_memory, program_memory
from top_jax.models import Segmenter, abstract_model
from top_jax.models.sliding import labels_of_windows
from top_jax.models.weights import Weights, join_weights, split_weights, statistics_of, weights_of
from top_jax.pruning import Reduction

INFERENCE: Final = "inference"
TRAIN_STEP: Final = "train step"
BOTH_PASSES: Final = (INFERENCE, TRAIN_STEP)
OPTIMIZER: Final = optax.adamw(1e-4)
_MOST_LABELS: Final = 255  # classes of a label map: it holds bytes, and 255 means no label

Batch = tuple[jax.Array, jax.Array, jax.Array]
"""Images float32 `[B, H, W, 3]`; int32 labels `[B]`, a segmenter's uint8 `[B, H, W]`; and `[B]` keys for dropout."""


def time_model(
    name: str,
    pruning: Reduction,
    batch: int,
    rounds: Rounds,
    *,
    passes: tuple[str, ...] = BOTH_PASSES,
    workers: int = 4,
    dtype: str = "bfloat16",
    **overrides: Any,
) -> list[Row]:
    """Times the dense and the pruned model in turn.

    Args:
        name: model name, as for `create_model`.
        pruning: reduction of the pruned model.
        batch: images per call.
        rounds: how long to time.
        passes: `INFERENCE`, `TRAIN_STEP` or both. A train step is forward in train mode, cross entropy, backward and
            AdamW.
        workers: programs compiled at a time.
        dtype: dtype of the matrix products.
        **overrides: other settings that replace the named model's own.

    Returns:
        A row for each pass and variant. `compile_s` is the time of tracing and compiling, `program_mib` what XLA
        reserves for the program, arguments and results included.
    """
    reductions = {"dense": None, "pruned": pruning}
    models = {k: abstract_model(name, pruning=r, dtype=dtype, **overrides) for k, r in reductions.items()}
    weights = random_weights(models["dense"])  # pruning adds no parameters
    sets = make_batches(models["dense"], batch)
    lower = {(k, which): lowering(model, which, weights, sets[0]) for k, model in models.items() for which in passes}
    compiled = compile_all(lower, workers)
    rows = []
    for which in passes:  # one after the other, so that a train step's memory is free while inference is timed
        runs = {k: run_of(compiled[k, which], model, which, weights, sets) for k, model in models.items()}
        timed = time_in_turn(runs, rounds)
        for variant, model in models.items():
            cost = count_macs(model.config, model.reduction)
            start: Row = {
                "model": name, "variant": variant, "pass": which, "dtype": dtype, "batch": batch,
                "implementation": model.scan_implementation, "gmacs_published": round(cost.gmacs("published"), 6),
            }  # fmt: skip
            rows.append(start | speed_row(compiled[variant, which], timed[variant], batch))
    return rows


def speed_row(program: Program | Exception, result: Timing | Exception, batch: int) -> Row:
    """Returns speed, compile time and memory of a timed program, or its `error`, for a report.

    `program_mib` is what XLA planned for it, and `process_peak_mib` the peak of this process on the device; each is
    left out where it is not known.
    """
    if isinstance(result, Exception):
        return {"error": one_line(result)}
    assert isinstance(program, Program)
    row: Row = {**result.rates(batch), **result.row(), "compile_s": round(program.seconds, 1)}
    if planned := program_memory(program.run):
        row["program_mib"] = round(planned["total"] / 2**20, 2)
    peak = peak_memory()
    if peak is not None and peak["of"] == "device":
        row["process_peak_mib"] = round(int(peak["bytes"]) / 2**20, 1)
    return row


def lowering(model: Model, which: str, weights: Weights, batch: tuple[Any, Any, Any]) -> Callable[[], Any]:
    """Returns a function that traces inference or a train step, for `compile_all`.

    Args:
        model: without weights.
        which: `INFERENCE` or `TRAIN_STEP`.
        weights: arrays or their shapes, like `batch`.
        batch: as `make_batches` returns it.
    """
    if which == INFERENCE:
        return functools.partial(jax.jit(make_inference(model)).lower, weights, batch[0])
    step = jax.jit(make_train_step(model, OPTIMIZER), donate_argnums=(0, 1))
    params, _ = split_weights(weights, statistics_of(model))
    return functools.partial(step.lower, weights, jax.eval_shape(OPTIMIZER.init, params), *batch)


def make_inference(model: Model) -> Callable[[Weights, jax.Array], jax.Array]:
    """Returns a function from weights and images to logits or, for a segmenter, to the class of each pixel.

    Each image of a segmenter is one window: as in evaluation, its decode head and `labels_of_windows` run.
    """
    graphdef = nnx.graphdef(model)

    def label(weights: Weights, images: jax.Array) -> jax.Array:
        size = (images.shape[1], images.shape[2])
        logits, _ = nnx.merge(graphdef, weights).logits(images)
        return labels_of_windows([logits], size, size, max(size), size)

    return label if isinstance(model, Segmenter) else lambda weights, images: nnx.merge(graphdef, weights)(images)


def make_train_step(model: Model, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns a train step: (weights, state, images, labels, keys) -> (weights, state, metrics).

    The optimizer's state is that of the parameters, without BatchNorm's statistics. `metrics` has the `loss`, and a
    segmenter's other sums, which training computes too.
    """
    graphdef, like, losses = nnx.graphdef(model), statistics_of(model), _losses_of(model)

    def loss_of(params: Weights, stats: Weights, batch: Batch) -> tuple[jax.Array, tuple[Any, Weights]]:
        model = nnx.merge(graphdef, params, stats)
        model.train()
        metrics = jax.tree.map(jnp.mean, losses(model, *batch))
        return metrics["loss"], (metrics, statistics_of(model))

    def step(weights: Weights, state: Any, *batch: jax.Array) -> tuple[Weights, Any, dict[str, jax.Array]]:
        params, stats = split_weights(weights, like)
        graded = jax.value_and_grad(loss_of, has_aux=True)
        (_, (metrics, stats)), gradients = graded(params, stats, cast("Batch", batch))
        updates, state = optimizer.update(gradients, state, params)
        params = cast("Weights", optax.apply_updates(params, updates))
        return join_weights(params, stats), state, metrics

    return step


def _losses_of(model: Model) -> Callable[..., dict[str, jax.Array]]:
    """Returns a function of model, images, labels and keys that returns the parts of training's loss, `[B]` each."""
    if isinstance(model, Segmenter):
        from top_jax.training import segmentation  # loads Orbax and Pillow, which no classifier needs here

        return functools.partial(segmentation.losses, aux_weight=OptimizerConfig.aux_weight)

    def losses(model: Any, images: jax.Array, labels: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        return {"loss": optax.softmax_cross_entropy_with_integer_labels(model(images, keys), labels)}

    return losses


def random_weights(model: Model) -> Weights:
    """Draws weights for timing, with NumPy, because compiling a model's own initialisers takes longer than the model.

    Matrices are normal and keep a signal's variance, vectors (biases, scales, variances) are uniform in 0.5 .. 1,
    counts are 0. So all values stay finite, and none is a denormal number, which would slow a CPU down. `model` may
    hold only the shapes of its weights.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32) / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, weights_of(model))


def make_batches(model: Model, batch: int, img_size: tuple[int, int] | None = None) -> list[Batch]:
    """Draws two batches of random images and labels.

    Args:
        model: with weights, or only their shapes.
        batch: B.
        img_size: (height, width); None is the model's.
    """
    size = backbone_of(model).config.img_size if img_size is None else img_size
    classes, dense = model.config.num_classes, isinstance(model, Segmenter)

    def draw(seed: int) -> Batch:
        pixels, labels, keys = jax.random.split(jax.random.key(seed), 3)
        images = jax.random.normal(pixels, (batch, *size, 3))
        if dense:
            drawn = jax.random.randint(labels, (batch, *size), 0, min(classes, _MOST_LABELS)).astype(jnp.uint8)
        else:
            drawn = jax.random.randint(labels, (batch,), 0, classes)
        return images, drawn, jax.random.split(keys, batch)

    return [draw(seed) for seed in (1, 2)]


def run_of(
    program: Program | Exception, model: Model, which: str, weights: Weights, sets: list[Batch]
) -> Run | Exception:
    """Returns what `time_in_turn` times: a compiled program over batches in turn, or the exception of compiling it.

    `model`, `which` and `weights` are those that the program was traced with; the weights are not changed.
    """
    if isinstance(program, Exception):
        return program
    if which == INFERENCE:
        return over_sets(program.run, [(weights, images) for images, *_ in sets])
    return _train_steps(program.run, model, weights, sets)


def _train_steps(program: Callable[..., Any], model: Model, weights: Weights, sets: list[Batch]) -> Run:
    """Returns a train step that keeps its state from call to call and reuses its buffers, as in training."""
    weights = jax.tree.map(jnp.copy, weights)  # the step donates its weights, and other programs need these
    state = OPTIMIZER.init(split_weights(weights, statistics_of(model))[0])

    def run(number: int) -> dict[str, jax.Array]:
        nonlocal weights, state
        weights, state, metrics = program(weights, state, *sets[number % len(sets)])
        return metrics

    return run
