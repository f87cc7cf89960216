"""JAX in 64 bits (JAX_ENABLE_X64=1): parameters stay float32, gradients exist, and runs of 32 bits are read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.models import abstract_model
from top_jax.models.depthwise_conv import grouped_conv2d, shifted_conv2d
from top_jax.models.weights import weights_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import abstract_weights, load_checkpoint, save_weights

FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1", "deit_tiny"])
def test_parameters_and_logits_are_float32(name):
    with jax.enable_x64(True):
        model = abstract_model(name, img_size=16, patch_size=8, embed_dim=24, depth=1, num_classes=3)
        assert {leaf.dtype for leaf in jax.tree.leaves(weights_of(model))} == {FLOAT32}


def test_the_gradient_of_shifted_products():
    """Its loop over the taps slices at int32 places. The gradient of the grouped convolution is the reference."""
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2)).astype(np.float32)
    with jax.enable_x64(True):
        got, want = (
            jax.jit(jax.grad(lambda x, kernel, f=f: (f(x, kernel) ** 2).sum(), argnums=(0, 1)))(x, kernel)
            for f in (shifted_conv2d, grouped_conv2d)
        )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == FLOAT32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_run_of_32_bits_is_read(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, optimizer=dataclasses.replace(tiny_config.optimizer, ema_decay=None))
    run = RunDirectory(tmp_path / "run")
    run.claim(config)
    save_weights(run, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_weights(config.model)))
    with jax.enable_x64(True):
        weights = weights_of(load_checkpoint(run.path))
    assert {(leaf.dtype, float(np.asarray(leaf).max())) for leaf in jax.tree.leaves(weights)} == {(FLOAT32, 1.0)}
