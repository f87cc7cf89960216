"""What is compiled of a model to be timed, forward and train step, its arguments, and the memory it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax.benchmark.timing import Row
from top_jax.models import Backbone, BackboneConfig
from top_jax.models.weights import Weights, join_weights, split_weights, statistics_of, weights_of
from top_jax.ops import implementations

PASSES: Final = ("inference", "train step")
LEARNING_RATE: Final = 1e-4


class TrainSteps:
    """A train step that carries its state from call to call, so that its buffers can be reused, as in training.

    Args:
        step: compiled, of `make_train_step`.
        weights: to begin with; copied.
        state: of the optimizer, to begin with; copied.
        sets: images and labels of one call after the other.
    """

    def __init__(self, step: Callable[..., Any], weights: Weights, state: Any, sets: list[tuple[jax.Array, jax.Array]]):
        self.step = step
        self.weights, self.state = jax.tree.map(jnp.copy, (weights, state))  # they are donated: others need them
        self.sets = sets

    def __call__(self, number: int) -> jax.Array:
        """The loss of one step, on the set of that number."""
        self.weights, self.state, loss = self.step(self.weights, self.state, *self.sets[number % len(self.sets)])
        return loss


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


def random_weights(model: Backbone, seed: int = 0) -> Weights:
    """Weights to be timed with, drawn by NumPy: a model's own initial values take longer to compile than it does.

    Matrices are normal with the variance that keeps a signal's, vectors (biases, scales, variances) uniform in
    0.5 .. 1, counts 0: everything stays finite, and nothing is so small that a CPU slows down.

    Args:
        model: shapes are enough (`nnx.eval_shape`).
        seed: of the draw.
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


def make_batches(config: BackboneConfig, batch: int) -> list[tuple[jax.Array, jax.Array]]:
    """Two sets of random images, float32 `[B, H, W, 3]`, and labels."""
    shape = (batch, *config.img_size, 3)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    return [(jax.random.normal(key, shape), jax.random.randint(key, shape[:1], 0, config.num_classes)) for key in keys]


def program_bytes(program: Any) -> int | None:
    """What XLA reserves for one call, arguments and results included; None where the backend does not tell."""
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return whole - sizes.alias_size_in_bytes


def memory_row(program: Any) -> Row:
    """MiB of a program, and the most this process has ever had on the device, where the backend tells."""
    row: Row = {}
    if (planned := program_bytes(program)) is not None:
        row["program_mib"] = round(planned / 2**20, 2)
    stats = implementations.device().memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        row["process_peak_mib"] = round(stats["peak_bytes_in_use"] / 2**20, 1)
    return row
