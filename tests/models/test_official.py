"""ViM against what the official PyTorch code computed (tests/fixtures/README.md)."""

from __future__ import annotations

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from compilation import OPTIMISED
from flax import nnx

from top_jax.convert.key_maps import official_keys
from top_jax.models import abstract_model
from top_jax.models.weights import KINDS

# Relative to the largest value. float32 against float64 gives 1e-6 in the official code itself.
FORWARD, GRADIENT = 1e-5, 1e-4
PARAMETERS = {
    "vim_tiny": 7_148_008,
    "vim_small": 25_796_584,
    "vim_base": 97_598_440,
    "plain_mamba_l1": 7_551_656,
    "plain_mamba_l2": 26_145_832,
    "plain_mamba_l3": 50_956_456,
}


@pytest.fixture(scope="module")
def official_gradients(official, quick_jit):
    """Returns the gradient of sum(logits * grad_weight) by (model, image), and the logits."""

    def loss(model, image):
        logits = model(image)
        return jnp.sum(logits * official["grad_weight"][None]), logits

    model = official.build()
    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(model, jnp.asarray(official.image))


def test_logits(official, official_gradients):
    (_, logits), _ = official_gradients
    assert relative_error(logits, official["logits"]) < FORWARD


def test_image_gradient(official, official_gradients):
    _, (_, image) = official_gradients
    assert relative_error(image, official.grad_image) < GRADIENT


def test_parameter_gradients(official, official_gradients):
    _, (model, _) = official_gradients
    gradients = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    keys = {key.torch: key for key in official_keys(model.config)}
    assert official.gradients.keys() <= keys.keys() and len(official.gradients) >= 7
    errors = {}
    for name, want in official.gradients.items():
        got = np.asarray(gradients[keys[name].ours][...])
        errors[name] = relative_error(keys[name].layout.to_torch(got), want)
    assert max(errors.values()) < GRADIENT, errors


def test_residual_after_each_block_and_class_feature(official, quick_jit):
    def by_hand(model, image):
        tokens, seen = model.embed(image), []
        for block in model.blocks:
            tokens, _ = block.mix(tokens, None, None)
            seen.append(model.stream(tokens))
        return seen, model.norm(seen[-1]), tokens.cls_index

    seen, normed, cls_index = quick_jit(by_hand)(official.build(), jnp.asarray(official.image))
    for got, want in zip(seen, official["residual_after_block"], strict=True):
        assert relative_error(got, want) < FORWARD
    np.testing.assert_array_equal(cls_index, (normed.shape[1] - 1) // 2)
    assert relative_error(normed[np.arange(2), cls_index], official["cls_feature"]) < FORWARD


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_micro", "plain_mamba_micro", "deit_micro"])
def test_optimised_program(name, official_case):
    case = official_case(name)
    logits = jax.jit(lambda m, x: m(x), compiler_options=OPTIMISED)(case.build(), jnp.asarray(case.image))
    assert relative_error(logits, case["logits"]) < FORWARD


@pytest.fixture(scope="module")
def official_models(fixtures):
    return json.loads(gzip.decompress((fixtures / "official_models.json.gz").read_bytes()))


# Each of the other models differs from one of these only in its sizes.
QUICK = ("vim_tiny", "plain_mamba_l1", "plain_mamba_l2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARAMETERS]
)
def test_every_official_parameter(name, official_models):
    model = abstract_model(name)
    trained = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(param.shape)) for _, param in trained) == PARAMETERS[name]
    ours = {path: weight.shape for path, weight in nnx.to_flat_state(nnx.state(model, KINDS))}
    assert PARAMETERS[name] == official_models[name]["parameters"]

    keys = official_keys(model.config)
    shapes = {key.torch: list(key.layout.to_torch(np.empty(ours[key.ours], np.bool_)).shape) for key in keys}
    assert shapes == official_models[name]["state_dict"]
    assert {key.ours for key in keys} == ours.keys() and len(keys) == len(ours)
