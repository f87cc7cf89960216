"""The training step: what it computes by hand, and that neither micro-batches nor masked rows change it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from top_jax.config import AugmentConfig, DataConfig, DistillationConfig, ModelConfig, OptimizerConfig, RunConfig
from top_jax.models import create_model
from top_jax.pruning import Pruning
from top_jax.training.state import create_state
from top_jax.training.steps import make_train_step

DATA = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PLAIN = AugmentConfig(flip=False)
BATCH = 8


class Prior(nnx.Module):
    """Logits that are parameters: everything about its step can be computed by hand."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, images, keys=None):
        return jnp.broadcast_to(self.logits[...], (images.shape[0], self.logits.shape[0]))


def recipe(classes, *, augment=PLAIN, **optimizer):
    return RunConfig(
        model=ModelConfig(num_classes=classes), data=DATA, augment=augment, optimizer=OptimizerConfig(**optimizer)
    )


def split(model):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def random_batch(seed=0, size=BATCH, side=8, classes=5):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, classes, size), jnp.int32),
        "mask": jnp.ones(size, jnp.float32),
        "index": jnp.arange(size, dtype=jnp.int32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_hand(smoothing):
    logits = [0.5, -1.0, 2.0]
    graphdef, params = split(Prior(logits))
    batch = {**random_batch(size=4), "label": jnp.array([0, 2, 2, 1]), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
    step = make_train_step(graphdef, optax.sgd(1.0), recipe(3, label_smoothing=smoothing))
    state, metrics = step(create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=False), batch)

    log_p = [x - math.log(sum(math.exp(y) for y in logits)) for x in logits]
    targets = [[(1 - smoothing) * (k == label) + smoothing / 3 for k in range(3)] for label in (0, 2, 2)]
    loss = -sum(t * p for target in targets for t, p in zip(target, log_p, strict=True)) / 3
    gradient = np.exp(log_p) - np.mean(targets, axis=0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 2 / 3, rtol=1e-6)  # of the unmasked three
    np.testing.assert_allclose(state.params["logits"], np.array(logits) - gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(state.params["logits"]), rtol=1e-6)
    assert int(state.step) == 1


def test_ema_by_hand():
    """ema_n = d ema_{n-1} + (1 - d) w_n, with the weights after the step; it starts as the first weights."""
    graphdef, params = split(Prior([0.5, -1.0, 2.0]))
    step = make_train_step(graphdef, optax.sgd(1.0), recipe(3, ema_decay=0.75))
    state = create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=True)
    expected = np.array(params["logits"])
    for n in range(3):
        state, _ = step(state, random_batch(n, classes=3))
        expected = 0.75 * expected + 0.25 * np.array(state.params["logits"])
        np.testing.assert_allclose(state.ema["logits"], expected, rtol=1e-6)
    assert np.abs(state.ema["logits"] - state.params["logits"]).max() > 1e-3


def test_no_ema_stays_none():
    graphdef, params = split(Prior([0.0, 1.0]))
    step = make_train_step(graphdef, optax.sgd(1.0), recipe(2))
    state, _ = step(create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=False), random_batch(classes=2))
    assert state.ema is None and set(state.weights()) == {"params"}


def test_not_finite_is_seen_in_the_metrics_of_its_step():
    """A gradient that overflows leaves a finite loss; so do weights that overflow."""
    graphdef, params = split(Prior([0.0, 1.0]))
    step = make_train_step(graphdef, optax.scale(jnp.inf), recipe(2))
    state, metrics = step(
        create_state(params, {}, optax.scale(jnp.inf), seed=0, with_ema=False), random_batch(classes=2)
    )
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["param_norm"])
    assert not np.isfinite(state.params["logits"]).all()


@pytest.fixture(scope="module")
def vim_steps():
    """A pruned ViM with drop-path: its step for 1, 2 and 4 micro-batches, under SGD, which shows the gradient."""
    model = create_model(
        "vim_tiny",
        num_classes=5,
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        d_state=4,
        drop_path=0.5,
        pruning=Pruning(after_blocks=(1,), keep_ratio=0.5),
    )
    graphdef, params = split(model)
    optimizer = optax.sgd(1.0)
    quick = {"xla_backend_optimization_level": 0}  # halves the time to compile, which is all the time there is
    steps = {
        parts: jax.jit(make_train_step(graphdef, optimizer, recipe(5, accumulate=parts)), compiler_options=quick)
        for parts in (1, 2, 4)
    }
    return steps, create_state(params, {}, optimizer, seed=3, with_ema=False)


def assert_same_step(got, expected):
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(got[1][name], expected[1][name], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0].params, expected[0].params)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(vim_steps, parts):
    """Drop-path draws by image, and masked images that are unevenly spread over the parts."""
    steps, state = vim_steps
    batch = random_batch(1) | {"mask": jnp.array([1, 0, 1, 1, 0, 0, 1, 1], jnp.float32)}
    expected = steps[1](state, batch)
    assert float(expected[1]["grad_norm"]) > 0.1
    assert_same_step(steps[parts](state, batch), expected)


def test_masked_images_count_for_nothing(vim_steps):
    steps, state = vim_steps
    mask = jnp.array([1, 0, 1, 1, 0, 0, 1, 1], jnp.float32)
    batch, other = random_batch(1), random_batch(2)
    swapped = {
        name: jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)) > 0, value, other[name])
        for name, value in batch.items()
    }
    expected = steps[1](state, batch | {"mask": mask})
    assert_same_step(steps[1](state, swapped | {"mask": mask}), expected)
    assert abs(float(steps[1](state, batch)[1]["loss"] - expected[1]["loss"])) > 1e-3  # and the others do count


def test_a_batch_of_unreadable_images(vim_steps):
    """Nothing to learn from is no reason to stop, and no division by zero."""
    steps, state = vim_steps
    after, metrics = steps[1](state, random_batch() | {"mask": jnp.zeros(BATCH)})
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_randomness_follows_the_step_and_the_seed(vim_steps):
    steps, state = vim_steps
    batch = random_batch()
    again = steps[1](state, batch)[1]["loss"]
    later = steps[1](dataclasses.replace(state, step=state.step + 1), batch)[1]["loss"]
    seeded = steps[1](dataclasses.replace(state, key=jax.random.key_data(jax.random.key(4))), batch)[1]["loss"]
    assert steps[1](state, batch)[1]["loss"] == again
    assert len({float(again), float(later), float(seeded)}) == 3
