"""The pure functions that training and evaluation jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.config import OptimizerConfig, RunConfig
from top_jax.data.device_augment import augment
from top_jax.errors import InputError
from top_jax.models.weights import Weights, join_weights, statistics_of
from top_jax.training.distillation import prediction_loss, teach, token_loss
from top_jax.training.state import TrainState

DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
METRICS: Final = (
    "loss",
    "accuracy",
    "distillation_loss",
    "token_loss",
    "grad_norm",
    "param_norm",
    "stats_norm",
)
"""As they are reported; the losses of distillation only with a teacher, stats_norm only of a model with BatchNorm."""

APART: Final = 2**32 - 1
"""Folded into a key for augmentation: rows of a batch and drop-paths of a model, folded into the same, count from 0."""


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    teacher: nnx.GraphDef[Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch, teacher_weights=None) -> (state, metrics)`.

    The whole batch is augmented and mixed (`top_jax.data.device_augment`). Then it is cut into `optimizer.accumulate`
    micro-batches whose gradients are summed with the weights they have in the whole batch, so that the result is that
    of the large batch. An image of mask 0 counts for nothing.

    BatchNorm is apart from both. It normalises with the statistics of one micro-batch, over all devices, and moves the
    running ones once for each, in order. An image of mask 0 is among them as the pixels that stand in its place: the
    model does not know of masks.

    Args:
        graphdef: of the model; the step runs it in train mode, whichever it is in.
        optimizer: as `make_optimizer` builds it.
        config: the sections optimizer (label smoothing, micro-batches, the moving average), data (how pixels are
            normalised), augment and distillation, and `model.num_classes`.
        teacher: of the dense model to learn from (`top_jax.training.distillation`), whose weights each call then
            needs; both are `Backbone`s. None: no distillation, whatever the config says.

    Returns:
        A pure function, to be jitted; it raises InputError for a teacher without weights, or weights without one.
        Metrics (`METRICS`) are float32 scalars: loss (the one that is minimised) and accuracy over the batch, where
        the right class of a mixed image is that of its larger share (the lower class where both are equal);
        distillation_loss and token_loss, before they are weighted; grad_norm before clipping, param_norm after the
        step, and stats_norm, of BatchNorm's running means and variances after it. Where all are finite, so is every
        number of the new state.
    """
    recipe = config.optimizer
    gradient = _make_gradient(graphdef, config, teacher)
    summed = ("loss", "accuracy") if teacher is None else ("loss", "accuracy", "distillation_loss", "token_loss")

    def train_step(
        state: TrainState, batch: DeviceBatch, teacher_weights: Weights | None = None
    ) -> tuple[TrainState, Metrics]:
        if (teacher is None) != (teacher_weights is None):
            raise InputError("a train step takes a teacher's weights if it was made with a teacher; pass both or none.")
        total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        batch = _augmented(state, batch, config)

        def add(carry: tuple[Any, Weights], micro: DeviceBatch) -> tuple[tuple[Any, Weights], None]:
            sums, stats = carry
            new, stats = gradient(state.params, stats, micro, total, teacher_weights)
            return (jax.tree.map(jnp.add, sums, new), stats), None

        if recipe.accumulate == 1:
            (sums, grads), stats = gradient(state.params, state.stats, batch, total, teacher_weights)
        else:
            nothing = {name: jnp.zeros(()) for name in summed}, jax.tree.map(jnp.zeros_like, state.params)
            micros = _split(batch, recipe.accumulate)
            ((sums, grads), stats), _ = jax.lax.scan(add, (nothing, state.stats), micros)

        state = _updated(state, grads, stats, optimizer, recipe)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(state.params), **_stats_norm(stats)}
        return state, {**sums, **norms}

    return train_step


def _make_gradient(
    graphdef: nnx.GraphDef[Any], config: RunConfig, teacher: nnx.GraphDef[Any] | None
) -> Callable[..., tuple[tuple[Metrics, Weights], Weights]]:
    """Builds `gradient(params, stats, micro, total, teacher_weights)`.

    Its result is what micro-batches add up (metrics, gradients), and the statistics that the next one goes on from.
    """
    distillation = config.distillation

    def losses(model: Any, micro: DeviceBatch, teaching: Any) -> tuple[jax.Array, Metrics]:
        """Logits, and `[B]` each: loss, and with a teacher its parts."""
        if teaching is None:
            logits = model(micro["image"], micro["key"])
            return logits, {"loss": optax.softmax_cross_entropy(logits, micro["target"])}
        features = model.features(micro["image"], micro["key"])
        logits = model.classify(features)
        divergence = prediction_loss(logits, teaching[0], distillation.temperature)
        difference = token_loss(features, teaching[1])
        loss = (1 - distillation.weight) * optax.softmax_cross_entropy(logits, micro["target"])
        loss = loss + distillation.weight * divergence + distillation.token_weight * difference
        return logits, {"loss": loss, "distillation_loss": divergence, "token_loss": difference}

    def micro_loss(
        params: Weights, stats: Weights, micro: DeviceBatch, total: jax.Array, teaching: Any
    ) -> tuple[jax.Array, tuple[Metrics, Weights]]:
        model = nnx.merge(graphdef, params, stats)
        model.train()
        logits, per_image = losses(model, micro, teaching)
        per_image["accuracy"] = jnp.argmax(logits, -1) == jnp.argmax(micro["target"], -1)
        sums = {name: jnp.sum(value * micro["mask"]) / total for name, value in per_image.items()}
        return sums["loss"], (sums, statistics_of(model))

    def gradient(
        params: Weights, stats: Weights, micro: DeviceBatch, total: jax.Array, teacher_weights: Weights | None
    ) -> tuple[tuple[Metrics, Weights], Weights]:
        teaching = None
        if teacher is not None and teacher_weights is not None:
            teaching = teach(teacher, teacher_weights, micro["image"])
        graded = jax.value_and_grad(micro_loss, has_aux=True)
        (_, (sums, stats)), grads = graded(params, stats, micro, total, teaching)
        return (sums, grads), stats

    return gradient


def _augmented(state: TrainState, batch: DeviceBatch, config: RunConfig) -> DeviceBatch:
    """The batch as the model sees it: image, target, mask, and key for the drop-paths."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = _image_keys(step_key, len(batch["label"]))
    images, targets = augment(
        batch,
        jax.vmap(lambda key: jax.random.fold_in(key, APART))(keys),
        jax.random.fold_in(step_key, APART),
        config.augment,
        config.data,
        num_classes=config.model.num_classes,
        label_smoothing=config.optimizer.label_smoothing,
    )
    return {"image": images, "target": targets, "mask": batch["mask"], "key": keys}


def _updated(
    state: TrainState,
    grads: Weights,
    stats: Weights,
    optimizer: optax.GradientTransformation,
    recipe: OptimizerConfig,
) -> TrainState:
    """The state after the step of these gradients, which left these statistics."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast("Weights", optax.apply_updates(state.params, updates))
    ema = state.ema
    if ema is not None and recipe.ema_decay is not None:
        ema = optax.incremental_update(join_weights(params, stats), ema, step_size=1 - recipe.ema_decay)
    return dataclasses.replace(state, step=state.step + 1, params=params, stats=stats, ema=ema, opt_state=opt_state)


def _stats_norm(stats: Weights) -> Metrics:
    """Of the means and variances; the scalars among the statistics count batches."""
    moments = [leaf for leaf in jax.tree.leaves(stats) if leaf.ndim]
    return {"stats_norm": optax.tree.norm(moments)} if moments else {}


def _image_keys(step_key: jax.Array, batch_size: int) -> jax.Array:
    """One key per image, from its place in the global batch: devices and micro-batches do not change the draws."""
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(jnp.arange(batch_size))


def _split(batch: DeviceBatch, parts: int) -> DeviceBatch:
    """`[B, ...]` to `[parts, B / parts, ...]`; every device keeps its own images, as neighbours go to other parts."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
