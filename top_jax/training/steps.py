"""The state of a run, and the training step: pure functions to be jitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.config import OptimizerConfig, RunConfig
from top_jax.data import DeviceBatch
from top_jax.data.device_augment import augment
from top_jax.errors import InputError
from top_jax.models.weights import Weights, join_weights, statistics_of
from top_jax.training import segmentation
from top_jax.training.distillation import prediction_loss, teach, token_loss
from top_jax.training.optimizer import freeze


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; all of it is saved in checkpoints.

    Attributes:
        step: int32, number of steps so far.
        params: float32 parameters, updated by the optimizer.
        stats: float32 running statistics of BatchNorm, updated by the forward pass; empty without BatchNorm.
        ema: exponential moving average of both, or None.
        opt_state: state of the optimizer.
        key: data of the PRNG key that every step's randomness derives from; it never changes.
    """

    step: jax.Array
    params: Weights
    stats: Weights
    ema: Weights | None
    opt_state: Any
    key: jax.Array

    def weights(self) -> dict[str, Weights]:
        """Returns the complete weights to evaluate and keep, by name: params, and ema if there is an average."""
        weights = {"params": join_weights(self.params, self.stats)}
        return weights if self.ema is None else {**weights, "ema": self.ema}


def create_state(
    params: Weights, stats: Weights, optimizer: optax.GradientTransformation, *, seed: int, with_ema: bool
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        ema=jax.tree.map(jnp.copy, join_weights(params, stats)) if with_ema else None,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )


Metrics = dict[str, jax.Array]
METRICS: Final = (
    "loss",
    "accuracy",
    "auxiliary_loss",
    "pixel_accuracy",
    "distillation_loss",
    "token_loss",
    "grad_norm",
    "param_norm",
    "stats_norm",
)
"""Names of the metrics. accuracy is a classifier's, auxiliary_loss and pixel_accuracy are a segmenter's. The losses of
distillation need a teacher, and stats_norm a model with BatchNorm."""

APART: Final = 2**32 - 1
"""Folded into a key for augmentation, apart from batch rows and drop-paths: those fold in numbers from 0."""


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    teacher: nnx.GraphDef[Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch, teacher_weights=None) -> (state, metrics)`.

    The whole batch is augmented and mixed (`top_jax.data.device_augment`). It is then split into
    `optimizer.accumulate` micro-batches. Their gradients are summed with the weights that they have in the whole batch,
    so that the result is that of the large batch. Images with mask 0 do not contribute.

    BatchNorm is an exception. It normalises with the statistics of one micro-batch, over all devices, and updates the
    running statistics once per micro-batch, in order. It includes the pixels that replace images with mask 0, because
    the model does not see the mask.

    With `optimizer.freeze_backbone` the model stays in eval mode: no drop-path, and BatchNorm normalises with its
    running statistics and keeps them. The neck and the heads of a segmenter still train.

    A segmenter's loss is that of `top_jax.training.segmentation`; its batch is augmented by the pipeline.

    Args:
        graphdef: graph of the model; the step switches it to train mode.
        optimizer: from `make_optimizer`.
        config: its sections optimizer (label smoothing, micro-batches, the moving average), data (pixel
            normalisation), augment and distillation, and `model.num_classes`.
        teacher: graph of the dense model to learn from (`top_jax.training.distillation`); each call then needs its
            weights. Both models are `Backbone`s. None turns distillation off, whatever the config sets.

    Returns:
        A pure function, to be jitted; it raises InputError for a teacher without weights, or weights without a teacher.
        Metrics (`METRICS`) are float32 scalars; if all are finite, so is every number of the new state:

            loss             minimised
            accuracy         over the batch; a mixed image has the class of its larger share (on a tie, the lower class)
            pixel_accuracy   over the labelled pixels of the batch; 0 if there are none
            auxiliary_loss, distillation_loss, token_loss   before they are weighted
            grad_norm        before clipping
            param_norm       after the step
            stats_norm       of BatchNorm's running means and variances, after the step
    """
    recipe = config.optimizer
    gradient = _make_gradient(graphdef, config, teacher)

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
            micros = _split(batch, recipe.accumulate)
            first = jax.tree.map(lambda a: a[0], micros)
            shapes = jax.eval_shape(gradient, state.params, state.stats, first, total, teacher_weights)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[0])
            ((sums, grads), stats), _ = jax.lax.scan(add, (nothing, state.stats), micros)

        state = _updated(state, grads, stats, optimizer, recipe)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(state.params), **_stats_norm(stats)}
        return state, {**segmentation.shares(sums), **norms}

    return train_step


def _make_gradient(
    graphdef: nnx.GraphDef[Any], config: RunConfig, teacher: nnx.GraphDef[Any] | None
) -> Callable[..., tuple[tuple[Metrics, Weights], Weights]]:
    """Builds `gradient(params, stats, micro, total, teacher_weights)`.

    It returns the metrics and gradients, to be summed over micro-batches, and the statistics for the next one.
    """
    distillation, frozen, dense = config.distillation, config.optimizer.freeze_backbone, config.model.is_segmenter

    def classified(model: Any, micro: DeviceBatch, teaching: Any) -> Metrics:
        """Returns per image `[B]` the loss and, with a teacher, its parts, and whether the class is correct."""
        logits, per_image = losses(model, micro, teaching)
        return {**per_image, "accuracy": jnp.argmax(logits, -1) == jnp.argmax(micro["target"], -1)}

    def segmented(model: Any, micro: DeviceBatch) -> Metrics:
        return segmentation.losses(model, micro["image"], micro["label"], micro["key"], config.optimizer.aux_weight)

    def losses(model: Any, micro: DeviceBatch, teaching: Any) -> tuple[jax.Array, Metrics]:
        """Returns logits, and per image `[B]` the loss and, with a teacher, its parts."""
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
        model = nnx.merge(graphdef, freeze(params) if frozen else params, stats)
        if dense or not frozen:
            model.train()
        if dense and frozen:
            model.backbone.eval()  # the heads' BatchNorm has no statistics yet
        per_image = segmented(model, micro) if dense else classified(model, micro, teaching)
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
    """Returns the batch as the model sees it: image, target (or label, of pixels), mask, and key for the drop-paths."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = _image_keys(step_key, len(batch["label"]))
    if config.model.is_segmenter:  # the pipeline augments images and labels together
        return {"image": batch["image"], "label": batch["label"], "mask": batch["mask"], "key": keys}
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
    """Returns the state after the step with these gradients and new statistics."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast("Weights", optax.apply_updates(state.params, updates))
    ema = state.ema
    if ema is not None and recipe.ema_decay is not None:
        ema = optax.incremental_update(join_weights(params, stats), ema, step_size=1 - recipe.ema_decay)
    return dataclasses.replace(state, step=state.step + 1, params=params, stats=stats, ema=ema, opt_state=opt_state)


def _stats_norm(stats: Weights) -> Metrics:
    """Returns the norm of running means and variances; the scalars among the statistics count batches."""
    moments = [leaf for leaf in jax.tree.leaves(stats) if leaf.ndim]
    return {"stats_norm": optax.tree.norm(moments)} if moments else {}


def _image_keys(step_key: jax.Array, batch_size: int) -> jax.Array:
    """Returns a key per image, from its row in the global batch: devices and micro-batches do not change the draws."""
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(jnp.arange(batch_size))


def _split(batch: DeviceBatch, parts: int) -> DeviceBatch:
    """Reshapes `[B, ...]` to `[parts, B / parts, ...]`, rows in turn, so that every device keeps its own images."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
