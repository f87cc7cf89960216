"""The pure functions that training and evaluation jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.config import DataConfig, OptimizerConfig
from top_jax.data import normalize
from top_jax.training.state import Params, TrainState

DeviceBatch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef[Any], optimizer: optax.GradientTransformation, recipe: OptimizerConfig, data: DataConfig
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch) -> (state, metrics)`.

    The batch is cut into `recipe.accumulate` micro-batches whose gradients are summed with the weights they have in
    the whole batch, so that the result is that of the large batch. An image of mask 0 counts for nothing.

    Args:
        graphdef: of the model in train mode.
        optimizer: as `make_optimizer` builds it.
        recipe: label smoothing, micro-batches and the moving average.
        data: how pixels are normalised.

    Returns:
        A pure function, to be jitted. Metrics are float32 scalars: loss and accuracy over the batch, grad_norm before
        clipping, and param_norm after the step. Where all are finite, so is every number of the new state.
    """

    def micro_loss(params: Params, micro: DeviceBatch, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = normalize(micro["image"], data.mean, data.std)
        logits = nnx.merge(graphdef, params)(images, micro["key"])
        targets = optax.smooth_labels(jax.nn.one_hot(micro["label"], logits.shape[-1]), recipe.label_smoothing)
        loss = jnp.sum(optax.softmax_cross_entropy(logits, targets) * micro["mask"]) / total
        return loss, jnp.sum((jnp.argmax(logits, -1) == micro["label"]) * micro["mask"]) / total

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        batch = {**batch, "key": _image_keys(state, len(batch["label"]))}
        value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)

        def add(summed: Any, micro: DeviceBatch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, summed, value_and_grad(state.params, micro, total)), None

        if recipe.accumulate == 1:
            (loss, accuracy), grads = value_and_grad(state.params, batch, total)
        else:
            nothing = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
            ((loss, accuracy), grads), _ = jax.lax.scan(add, nothing, _split(batch, recipe.accumulate))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and recipe.ema_decay is not None:
            ema = optax.incremental_update(params, ema, step_size=1 - recipe.ema_decay)
        state = dataclasses.replace(state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        return state, {"loss": loss, "accuracy": accuracy, **norms}

    return train_step


def _image_keys(state: TrainState, batch_size: int) -> jax.Array:
    """One key per image, from its place in the global batch: devices and micro-batches do not change the draws."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(jnp.arange(batch_size))


def _split(batch: DeviceBatch, parts: int) -> DeviceBatch:
    """`[B, ...]` to `[parts, B / parts, ...]`; every device keeps its own images, as neighbours go to other parts."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
