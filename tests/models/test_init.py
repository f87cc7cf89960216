"""Initial values equal the official ones, which were measured on the official vim_tiny_patch16_224."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from top_jax.convert.key_maps import official_keys
from top_jax.models import abstract_model, create_model, model_config
from top_jax.models.weights import variables_by_path

DEPTH = 3
# Official name -> b of U(-b, b), which has deviation b / sqrt(3).
UNIFORM = {
    "in_proj.weight": 192**-0.5,
    "conv1d.weight": 4**-0.5,
    "conv1d.bias": 4**-0.5,
    "x_proj.weight": 384**-0.5,
    "dt_proj.weight": 12**-0.5,
    "conv1d_b.weight": 4**-0.5,
    "conv1d_b.bias": 4**-0.5,
    "x_proj_b.weight": 384**-0.5,
    "dt_proj_b.weight": 12**-0.5,
    "out_proj.weight": 384**-0.5 / DEPTH**0.5,
}
NORMAL = {"cls_token": 0.02, "pos_embed": 0.02, "head.weight": 0.02, "patch_embed.proj.weight": 768**-0.5 / 0.8796}
CONSTANT = {
    "patch_embed.proj.bias": 0.0,
    "head.bias": 0.0,
    "norm_f.weight": 1.0,
    "layers.1.norm.weight": 1.0,
    "layers.1.mixer.D": 1.0,
    "layers.1.mixer.D_b": 1.0,
    "layers.1.mixer.dt_proj_b.bias": 0.0,
}


@pytest.fixture(scope="module")
def initial():
    """Returns {official key: initial value} of a shallow vim_tiny."""
    build = jax.jit(
        lambda: nnx.state(create_model("vim_tiny", depth=DEPTH), nnx.Param),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    params = dict(nnx.to_flat_state(build()))
    return {
        key.torch: np.asarray(params[key.ours][...]) for key in official_keys(model_config("vim_tiny", depth=DEPTH))
    }


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform(initial, name):
    values, bound = initial[f"layers.1.mixer.{name}"], UNIFORM[name]
    assert 0.97 * bound < np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / 3**0.5, rel=0.08)
    assert abs(values.mean()) < 5 * bound / 3**0.5 / values.size**0.5
    assert (values != initial[f"layers.2.mixer.{name}"]).any()  # every block draws separately


@pytest.mark.parametrize("name", NORMAL)
def test_normal(initial, name):
    values, deviation = initial[name], NORMAL[name]
    assert values.std() == pytest.approx(deviation, rel=0.2 if values.size < 1000 else 0.03)
    assert abs(values.mean()) < 5 * deviation / values.size**0.5
    assert np.abs(values).max() > 2.2 * deviation  # not truncated


@pytest.mark.parametrize("name", CONSTANT)
def test_constant(initial, name):
    assert (initial[name] == CONSTANT[name]).all()


@pytest.mark.parametrize("name", ["A_log", "A_b_log"])
def test_decay_rates_are_one_to_n(initial, name):
    np.testing.assert_allclose(
        np.exp(initial[f"layers.1.mixer.{name}"]), np.tile(np.arange(1, 17.0), (384, 1)), rtol=1e-6
    )


def test_forward_time_steps_are_log_uniform(initial):
    steps = np.asarray(jax.nn.softplus(jnp.asarray(initial["layers.1.mixer.dt_proj.bias"])))
    assert 0.9e-3 < steps.min() < 1.2e-3 and 0.09 < steps.max() < 0.101
    quartiles = np.quantile(np.log10(steps), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [-2.5, -2, -1.5], atol=0.15)


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1", "deit_tiny"])
def test_weights_are_float32_in_64_bits(name):
    """JAX_ENABLE_X64=1 changes JAX's defaults, and no weight."""
    with jax.enable_x64(True):
        weights = variables_by_path(abstract_model(name, depth=2, num_classes=3))
    assert {str(weight.dtype) for weight in weights.values()} == {"float32"}
