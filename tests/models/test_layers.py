"""Shared layers against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from top_jax.models.depthwise_conv import depthwise_conv2d, grouped_conv2d, shifted_conv2d
from top_jax.models.layers import BatchNorm, moves_statistics

SHAPES = [((2, 5, 7, 3), 7), ((1, 1, 1, 2), 7), ((3, 4, 2, 5), 3), ((2, 6, 6, 1), 5), ((1, 3, 3, 4), 1)]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def by_hand(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    half, y = len(kernel) // 2, np.zeros(x.shape)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            for i in range(len(kernel)):
                for j in range(len(kernel)):
                    r, c = row + i - half, column + j - half
                    if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                        y[:, row, column] += x[:, r, c] * kernel[i, j]
    return y


@pytest.mark.parametrize(("shape", "taps"), SHAPES)
@pytest.mark.parametrize("conv", [depthwise_conv2d, shifted_conv2d, grouped_conv2d])
def test_depthwise_conv(conv, shape, taps):
    x, kernel = draw(*shape), draw(taps, taps, shape[-1])
    np.testing.assert_allclose(jax.jit(conv)(x, kernel), by_hand(x, kernel), atol=1e-4)


@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_depthwise_conv_gradients(shape, taps):
    x, kernel, dy = draw(*shape), draw(taps, taps, shape[-1]), draw(*shape)
    convs = (depthwise_conv2d, shifted_conv2d, grouped_conv2d)
    *pulled, wanted = jax.jit(lambda dy, *args: [jax.vjp(conv, *args)[1](dy) for conv in convs])(dy, x, kernel)
    for got in pulled:
        for mine, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine, want, atol=1e-4)


def test_depthwise_conv_sums_in_float32():
    x, kernel = np.ones((1, 9, 9, 1), jnp.bfloat16), np.full((7, 7, 1), 1 + 2**-7, jnp.bfloat16)
    y = np.asarray(jax.jit(depthwise_conv2d)(x, kernel))
    assert y.dtype == jnp.bfloat16
    assert y[0, 4, 4, 0] == jnp.bfloat16(49 * (1 + 2**-7))


def test_batch_norm_in_train_and_eval_mode():
    """torch.nn.BatchNorm2d: momentum 0.1, normalises with the biased variance, stores the unbiased one."""
    norm = BatchNorm(3)
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, -1.0]), jnp.asarray([0.0, 0.5, 1.0])
    batches = [draw(2, 3, 4, 3) * np.float32(scale) + np.float32(scale) for scale in (1.0, 3.0)]
    mean, var = np.zeros(3), np.ones(3)

    @jax.jit  # the statistics that it moves come back, because the program changes a copy
    def run(norm, batch):
        return norm(batch), nnx.state(norm, nnx.BatchStat)

    for batch in batches:
        own, spread = batch.mean((0, 1, 2)), batch.var((0, 1, 2))
        want = (batch - own) / np.sqrt(spread + 1e-5) * [1, 2, -1] + [0, 0.5, 1]
        got, statistics = run(norm, batch)
        nnx.update(norm, statistics)
        np.testing.assert_allclose(got, want, atol=1e-5)
        mean, var = 0.9 * mean + 0.1 * own, 0.9 * var + 0.1 * spread * 24 / 23
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    assert norm.num_batches[...] == 2

    norm.eval()
    want = (batches[0] - mean) / np.sqrt(var + 1e-5) * [1, 2, -1] + [0, 0.5, 1]
    got, statistics = run(norm, batches[0])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert statistics["num_batches"][...] == 2


def test_batch_norm_statistics_carry_no_gradient():
    norm = BatchNorm(2)
    graphdef, state = nnx.split(norm)
    weights = nnx.to_pure_dict(state)

    def running_mean(x):
        module = nnx.merge(graphdef, weights)
        module(x)
        return jnp.sum(module.mean[...])

    assert not np.asarray(jax.jit(jax.grad(running_mean))(draw(4, 2))).any()


def test_what_moves_statistics():
    """Ours, and Flax's, which a user's block may hold."""
    for norm in (BatchNorm(3), nnx.BatchNorm(3, rngs=nnx.Rngs(0))):
        holder = nnx.Sequential(norm)
        holder.train()
        assert moves_statistics(holder)
        holder.eval()
        assert not moves_statistics(holder)
    assert not moves_statistics(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
