"""Accuracy over a whole split; every image counts once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax import distributed
from top_jax.config import DataConfig
from top_jax.data import (
    PADDING_INDEX,
    Batches,
    DeviceBatch,
    Source,
    check_classes,
    eval_batches,
    normalize,
    prefetch_to_device,
)
from top_jax.errors import InputError
from top_jax.models import Backbone
from top_jax.models.weights import Weights, weights_of
from top_jax.sharding import by_image, check_divisible, make_mesh, replicated
from top_jax.typing import Array, Float, Int


def make_eval_step(
    graphdef: nnx.GraphDef[Any], data: DataConfig
) -> Callable[[Weights, DeviceBatch], dict[str, jax.Array]]:
    """Builds the jitted `eval_step(weights, batch)`, which sums over the images with mask 1.

    Args:
        graphdef: the model's graph definition; the step switches it to eval mode.
        data: the config's data section; its mean and standard deviation normalise the pixels.

    Returns:
        A function that returns float32 scalars: correct, correct_top5 (with six classes or more; with fewer it is not
        informative), loss, count, and unreadable (images that could not be read).
    """

    @jax.jit
    def eval_step(weights: Weights, batch: DeviceBatch) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        model.eval()
        logits = model(normalize(batch["image"], data.mean, data.std))
        mask, label = batch["mask"], batch["label"]
        # On a mesh, jax.lax.top_k gathers the logits of the whole batch; XLA partitions a sort.
        best = jnp.argsort(logits, axis=-1, stable=True, descending=True)[:, :5]
        hit = best == label[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        top5 = {"correct_top5": jnp.sum(jnp.any(hit, axis=1) * mask)} if logits.shape[-1] > 5 else {}
        return {
            "correct": jnp.sum(hit[:, 0] * mask),
            **top5,
            "loss": jnp.sum(loss * mask),
            **images_of(mask, batch["index"]),
        }

    return eval_step


def images_of(mask: Float[Array, " B"], index: Int[Array, " B"]) -> dict[str, jax.Array]:
    """Counts images, float32: `count`, those with mask 1, and `unreadable`, those of the split with mask 0."""
    unreadable = jnp.sum((mask == 0) & (index != PADDING_INDEX)).astype(jnp.float32)
    return {"count": jnp.sum(mask), "unreadable": unreadable}


def evaluate(
    eval_step: Callable[[Weights, DeviceBatch], dict[str, jax.Array]],
    weights: Weights,
    batches: Batches,
    sharding: jax.sharding.Sharding,
    *,
    prefetch: int,
    on_batch: Callable[[int], None] = lambda images: None,
    summarize: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Evaluates a model on one pass over a split.

    Args:
        eval_step: what `make_eval_step` returns.
        weights: all weights of the model.
        batches: a fresh pass over the split (`top_jax.data.eval_batches`).
        sharding: sharding of the batch axis.
        prefetch: number of batches that are kept ready on the devices.
        on_batch: called after each batch with its number of images, for a progress bar.
        summarize: computes the result from the step's sums, float64 scalars or arrays, such as `accuracies`.

    Returns:
        The result of `summarize`, and images: how many were counted; unreadable: how many could not be read;
        images_per_second: of the whole loop with loading, except the first batch, which compiles (None without a second
        batch).

    Raises:
        InputError: no image could be read.
    """
    sums: dict[str, Any] = {}
    start, images_before = None, 0.0
    with batches:
        for batch, _ in prefetch_to_device(batches, sharding, prefetch):
            result = {name: np.asarray(value, np.float64) for name, value in eval_step(weights, batch).items()}
            sums = {name: sums.get(name, 0.0) + value for name, value in result.items()}
            if start is None:
                start, images_before = time.perf_counter(), sums["count"]
            on_batch(int(result["count"]))
    count = sums.get("count", 0.0)
    if not count:
        raise InputError(
            f"no image to evaluate could be read ({int(sums.get('unreadable', 0)):,} tried)"
            + "".join(f", such as {line}" for line in list(batches.corrupt.values())[:1])
            + "; correct config.data, or replace the images."
        )
    seconds = time.perf_counter() - start if start is not None else 0.0
    timed = sums["count"] - images_before
    return {
        **summarize(sums),
        "images": int(count),
        "unreadable": int(sums["unreadable"]),  # over all processes
        "images_per_second": float(timed / seconds) if timed else None,
    }


def accuracies(sums: dict[str, Any]) -> dict[str, float]:
    """Returns accuracy and, with six classes or more, accuracy_top5 (shares), and loss (nats), from a step's sums."""
    count = sums["count"]
    return {
        "accuracy": float(sums["correct"] / count),
        **({"accuracy_top5": float(sums["correct_top5"] / count)} if "correct_top5" in sums else {}),
        "loss": float(sums["loss"] / count),
    }


def evaluate_model(
    model: Backbone,
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, float | int | None]:
    """Evaluates a classifier on a whole source, on all devices; returns the numbers of `evaluate` and `accuracies`.

    Raises:
        InputError: the source has a different number of classes, or the batch size is not divisible by the devices.
    """
    return evaluate_source(
        weights_of(model),
        make_eval_step(nnx.graphdef(model), data),
        source,
        data,
        num_classes=model.config.num_classes,
        img_size=model.config.img_size,
        batch_size=batch_size,
        on_batch=on_batch,
        summarize=accuracies,
    )


def evaluate_source(
    weights: Weights,
    eval_step: Callable[[Weights, DeviceBatch], dict[str, jax.Array]],
    source: Source,
    data: DataConfig,
    *,
    num_classes: int,
    img_size: tuple[int, int],
    batch_size: int,
    on_batch: Callable[[int], None],
    summarize: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Evaluates weights on a whole source, on all devices; arguments and result as for `evaluate` and `eval_batches`.

    Raises:
        InputError: the source has a different number of classes, or the batch size is not divisible by the devices.
    """
    check_classes(source, num_classes, "evaluate it on the data it was trained for")
    check_divisible("batch_size", batch_size)
    mesh = make_mesh()
    batches = eval_batches(
        source,
        data,
        img_size=img_size,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        rows_multiple=len(jax.devices()),
    )
    return evaluate(
        eval_step,
        distributed.to_global(weights, jax.tree.map(lambda _: replicated(mesh), weights)),
        batches,
        by_image(mesh),
        prefetch=data.prefetch,
        on_batch=on_batch,
        summarize=summarize,
    )
