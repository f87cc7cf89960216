"""The pure functions that training and evaluation jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.config import DataConfig, OptimizerConfig
from top_jax.data import normalize
from top_jax.models.weights import Weights, join_weights, statistics_of
from top_jax.training.state import TrainState

DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
METRICS: Final = ("loss", "accuracy", "grad_norm", "param_norm", "stats_norm")
"""As they are reported; stats_norm only of a model with BatchNorm."""


def make_train_step(
    graphdef: nnx.GraphDef[Any], optimizer: optax.GradientTransformation, recipe: OptimizerConfig, data: DataConfig
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch) -> (state, metrics)`.

    The batch is cut into `recipe.accumulate` micro-batches whose gradients are summed with the weights they have in
    the whole batch, so that the result is that of the large batch. An image of mask 0 counts for nothing.

    BatchNorm is apart from both. It normalises with the statistics of one micro-batch, over all devices, and moves the
    running ones once for each, in order. An image of mask 0 is among them as the pixels that stand in its place: the
    model does not know of masks.

    Args:
        graphdef: of the model; the step runs it in train mode, whichever it is in.
        optimizer: as `make_optimizer` builds it.
        recipe: label smoothing, micro-batches and the moving average.
        data: how pixels are normalised.

    Returns:
        A pure function, to be jitted. Metrics (`METRICS`) are float32 scalars: loss and accuracy over the batch,
        grad_norm before clipping, param_norm after the step, and stats_norm, of BatchNorm's running means and variances
        after it. Where all are finite, so is every number of the new state.
    """

    def micro_loss(params: Weights, stats: Weights, micro: DeviceBatch, total: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, stats)
        model.train()
        logits = model(normalize(micro["image"], data.mean, data.std), micro["key"])
        targets = optax.smooth_labels(jax.nn.one_hot(micro["label"], logits.shape[-1]), recipe.label_smoothing)
        loss = jnp.sum(optax.softmax_cross_entropy(logits, targets) * micro["mask"]) / total
        accuracy = jnp.sum((jnp.argmax(logits, -1) == micro["label"]) * micro["mask"]) / total
        return loss, (accuracy, statistics_of(model))

    def gradient(params: Weights, stats: Weights, micro: DeviceBatch, total: jax.Array) -> tuple[Any, Weights]:
        """What micro-batches add up (loss, accuracy, gradients), and what the next one goes on from."""
        (loss, (accuracy, stats)), grads = jax.value_and_grad(micro_loss, has_aux=True)(params, stats, micro, total)
        return (loss, accuracy, grads), stats

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        batch = {**batch, "key": _image_keys(state, len(batch["label"]))}

        def add(carry: tuple[Any, Weights], micro: DeviceBatch) -> tuple[tuple[Any, Weights], None]:
            summed, stats = carry
            new, stats = gradient(state.params, stats, micro, total)
            return (jax.tree.map(jnp.add, summed, new), stats), None

        if recipe.accumulate == 1:
            (loss, accuracy, grads), stats = gradient(state.params, state.stats, batch, total)
        else:
            nothing = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            micros = _split(batch, recipe.accumulate)
            ((loss, accuracy, grads), stats), _ = jax.lax.scan(add, (nothing, state.stats), micros)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast("Weights", optax.apply_updates(state.params, updates))
        ema = state.ema
        if ema is not None and recipe.ema_decay is not None:
            ema = optax.incremental_update(join_weights(params, stats), ema, step_size=1 - recipe.ema_decay)
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, stats=stats, ema=ema, opt_state=opt_state
        )
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
        return state, {**metrics, "param_norm": optax.tree.norm(params), **_stats_norm(stats)}

    return train_step


def _stats_norm(stats: Weights) -> Metrics:
    """Of the means and variances; the scalars among the statistics count batches."""
    moments = [leaf for leaf in jax.tree.leaves(stats) if leaf.ndim]
    return {"stats_norm": optax.tree.norm(moments)} if moments else {}


def _image_keys(state: TrainState, batch_size: int) -> jax.Array:
    """One key per image, from its place in the global batch: devices and micro-batches do not change the draws."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(jnp.arange(batch_size))


def _split(batch: DeviceBatch, parts: int) -> DeviceBatch:
    """`[B, ...]` to `[parts, B / parts, ...]`; every device keeps its own images, as neighbours go to other parts."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
