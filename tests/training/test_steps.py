"""The training step: what it computes by hand, and that neither micro-batches nor masked rows change it.

This file is also the program that is started on eight devices.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx

from top_jax.config import AugmentConfig, DataConfig, DistillationConfig, ModelConfig, OptimizerConfig, RunConfig
from top_jax.data.device_augment import augment
from top_jax.data.transforms import normalize
from top_jax.errors import InputError
from top_jax.models import Features, create_model
from top_jax.models.layers import DropPath
from top_jax.models.weights import weights_of
from top_jax.pruning import Pruning
from top_jax.training.distillation import prediction_loss, teach, token_loss
from top_jax.training.steps import create_state, make_train_step

DATA = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PLAIN = AugmentConfig(flip=False)
ALL = AugmentConfig(erasing=0.5, mixup=0.8, cutmix=1.0)
BATCH, DEVICES = 8, 8
MASK = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.float32)


class Prior(nnx.Module):
    """Logits that are parameters: everything about its step can be computed by hand."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, images, keys=None):
        return jnp.broadcast_to(self.logits[...], (images.shape[0], self.logits.shape[0]))


def recipe(classes, *, augment=PLAIN, distillation=None, **optimizer):
    return RunConfig(
        model=ModelConfig(num_classes=classes),
        data=DATA,
        augment=augment,
        distillation=distillation or DistillationConfig(),
        optimizer=OptimizerConfig(**optimizer),
    )


def split(model):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def random_batch(seed=0, size=BATCH, side=8, classes=5):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, classes, size), jnp.int32),
        "mask": jnp.asarray(np.ones(size, np.float32)),
        "index": jnp.asarray(np.arange(size, dtype=np.int32)),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_hand(smoothing):
    logits = [0.5, -1.0, 2.0]
    graphdef, params = split(Prior(logits))
    batch = {
        **random_batch(size=4),
        "label": np.array([0, 2, 2, 1], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }
    step = jax.jit(make_train_step(graphdef, optax.sgd(1.0), recipe(3, label_smoothing=smoothing)))
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
    step = jax.jit(make_train_step(graphdef, optax.sgd(1.0), recipe(3, ema_decay=0.75)))
    state = create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=True)
    expected = np.array(params["logits"])
    for n in range(3):
        state, _ = step(state, random_batch(n, classes=3))
        expected = 0.75 * expected + 0.25 * np.array(state.params["logits"])
        np.testing.assert_allclose(state.ema["logits"], expected, rtol=1e-6)
    assert np.abs(np.asarray(state.ema["logits"]) - np.asarray(state.params["logits"])).max() > 1e-3


def test_no_ema_stays_none():
    graphdef, params = split(Prior([0.0, 1.0]))
    step = jax.jit(make_train_step(graphdef, optax.sgd(1.0), recipe(2)))
    state, _ = step(create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=False), random_batch(classes=2))
    assert state.ema is None and set(state.weights()) == {"params"}


def test_not_finite_is_seen_in_the_metrics_of_its_step():
    """A gradient that overflows leaves a finite loss; so do weights that overflow."""
    graphdef, params = split(Prior([0.0, 1.0]))
    step = jax.jit(make_train_step(graphdef, optax.scale(jnp.inf), recipe(2)))
    state, metrics = step(
        create_state(params, {}, optax.scale(jnp.inf), seed=0, with_ema=False), random_batch(classes=2)
    )
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["param_norm"])
    assert not np.isfinite(state.params["logits"]).all()


class Watching(nnx.Module):
    """`Prior`, and a note of what it sees."""

    seen = []

    def __init__(self, logits):
        self.prior = Prior(logits)

    def __call__(self, images, keys):
        jax.debug.callback(lambda *seen: Watching.seen.append(seen), images, jax.random.key_data(keys))
        return self.prior(images)


def test_what_the_model_sees():
    """Images that are augmented and mixed, and keys for drop-path that know of no augmentation.

    Each row's key is of its place in the batch; 2**32 - 1, which is no place and no drop-path, makes those for
    augmentation.
    """
    graphdef, params = split(Watching([0.5, -1.0, 2.0]))
    state = create_state(params, {}, optax.sgd(1.0), seed=3, with_ema=False)
    state = dataclasses.replace(state, step=jnp.asarray(7, jnp.int32))
    batch = random_batch(classes=3)

    @jax.jit
    def by_hand(batch):
        step_key = jax.random.fold_in(jax.random.key(3), 7)
        keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(BATCH))
        of_augmentation = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 1))(keys)
        settings = dict(config=ALL, data=DATA, num_classes=3, label_smoothing=0.1)
        images, _ = augment(batch, of_augmentation, jax.random.fold_in(step_key, 2**32 - 1), **settings)
        return images, jax.random.key_data(keys)

    Watching.seen.clear()
    jax.jit(make_train_step(graphdef, optax.sgd(1.0), recipe(3, augment=ALL)))(state, batch)
    jax.effects_barrier()
    ((images, seen_keys),) = Watching.seen
    expected, keys = by_hand(batch)
    np.testing.assert_allclose(images, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(seen_keys, keys)


@pytest.mark.parametrize("alphas", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixed_targets_by_hand(alphas):
    """The loss is linear in the shares, which images of white and black show; right is the class of the larger one."""
    logits = [0.5, -1.0, 2.0]
    graphdef, params = split(Watching(logits))
    config = recipe(3, augment=dataclasses.replace(PLAIN, **alphas), label_smoothing=0.0)
    step = jax.jit(make_train_step(graphdef, optax.sgd(1.0), config))
    white = np.array([0, 255, 0, 0], np.uint8)
    batch = {
        "image": jnp.asarray(np.broadcast_to(white[:, None, None, None], (4, 8, 8, 3))),
        "label": jnp.asarray(np.array([0, 2, 1, 1], np.int32)),
        "mask": jnp.asarray(np.array([1, 1, 1, 0], np.float32)),
    }
    log_p = np.array([x - math.log(sum(math.exp(y) for y in logits)) for x in logits])
    larger = set()
    for seed in range(40):
        Watching.seen.clear()
        _, metrics = step(create_state(params, {}, optax.sgd(1.0), seed=seed, with_ema=False), batch)
        jax.effects_barrier()
        of_1, of_2 = (float(np.mean(Watching.seen[0][0][row]) + 1) / 2 for row in (1, 2))  # shares of the white image
        # Row 0 is alone, because row 3 holds no image; 1 and 2 are mixed with each other.
        loss = -log_p[0] - sum(white * log_p[2] + (1 - white) * log_p[1] for white in (of_1, of_2))
        np.testing.assert_allclose(metrics["loss"], loss / 3, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], ((of_1 > 0.5) + (of_2 > 0.5)) / 3, rtol=1e-6)
        np.testing.assert_allclose(of_1 + of_2, 1, rtol=1e-6)
        larger.add(of_1 > 0.5)
    assert larger == {True, False}


class Patches(nnx.Module):
    """The least that can be distilled: four patches, of which some are kept, and drop-path."""

    def __init__(self, kept=(0, 1, 2, 3), drop_path=0.0, seed=0):
        rngs = nnx.Rngs(seed)
        self.kept = kept
        self.embed, self.head = nnx.Linear(48, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
        self.drop_path = DropPath(drop_path, 0)

    def __call__(self, images, keys=None):
        return self.classify(self.features(images, keys))

    def features(self, images, keys=None):
        patches = rearrange(images, "b (r h) (c w) d -> b (r c) (h w d)", r=2, c=2)[:, self.kept, :]
        x = jnp.tanh(self.embed(patches))
        x = x + self.drop_path(jnp.square(x), keys)
        positions = jnp.broadcast_to(jnp.asarray(self.kept, jnp.int32), x.shape[:2])
        return Features(x, positions, None, jnp.zeros((len(x), 4), jnp.int32), (2, 2))

    def classify(self, features):
        return self.head(jnp.mean(features.x, axis=1))


@pytest.fixture(scope="module")
def steps():
    """A model with drop-path: its step for 1, 2 and 4 micro-batches, under SGD, which shows the gradient."""
    graphdef, params = split(Patches(drop_path=0.5))
    optimizer = optax.sgd(1.0)
    steps = {
        parts: jax.jit(make_train_step(graphdef, optimizer, recipe(5, augment=ALL, accumulate=parts)))
        for parts in (1, 2, 4)
    }
    return steps, create_state(params, {}, optimizer, seed=3, with_ema=False)


def assert_same_step(got, expected):
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(got[1][name], expected[1][name], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0].params, expected[0].params)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(steps, parts):
    """Everything that is random goes by image or by batch; masked images are unevenly spread over the parts."""
    steps, state = steps
    batch = random_batch(1) | {"mask": MASK}
    expected = steps[1](state, batch)
    assert float(expected[1]["grad_norm"]) > 0.1
    assert_same_step(steps[parts](state, batch), expected)


def test_masked_images_count_for_nothing(steps):
    """Nor are they mixed into others."""
    steps, state = steps
    mask = MASK
    batch, other = random_batch(1), random_batch(2)
    swapped = {
        name: np.where(mask.reshape(-1, *[1] * (value.ndim - 1)) > 0, value, other[name])
        for name, value in batch.items()
    }
    expected = steps[1](state, batch | {"mask": mask})
    assert_same_step(steps[1](state, swapped | {"mask": mask}), expected)
    assert abs(float(steps[1](state, batch)[1]["loss"]) - float(expected[1]["loss"])) > 1e-3  # and the others do count


def test_a_batch_of_unreadable_images(steps):
    """Nothing to learn from is no reason to stop, and no division by zero."""
    steps, state = steps
    after, metrics = steps[1](state, random_batch() | {"mask": np.zeros(BATCH, np.float32)})
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_randomness_follows_the_step_and_the_seed(steps):
    steps, state = steps
    batch = random_batch()
    again = steps[1](state, batch)[1]["loss"]
    later = steps[1](dataclasses.replace(state, step=state.step + 1), batch)[1]["loss"]
    seeded = steps[1](dataclasses.replace(state, key=jax.random.key_data(jax.random.key(4))), batch)[1]["loss"]
    assert steps[1](state, batch)[1]["loss"] == again
    assert len({float(again), float(later), float(seeded)}) == 3


@pytest.fixture(scope="module")
def distilled():
    """Graphdefs and weights of a model that keeps two patches and of another, dense one; the config of their step."""
    student, dense = Patches(kept=(3, 1)), Patches(seed=1)
    distillation = DistillationConfig(teacher="given", weight=0.3, temperature=2.0, token_weight=0.4)
    return nnx.graphdef(student), weights_of(student), nnx.graphdef(dense), weights_of(dense), distillation


def test_distillation_by_hand(distilled):
    """Loss, its parts and its gradient, which SGD shows; from micro-batches, as from the whole batch."""
    graphdef, params, teacher, teacher_weights, distillation = distilled
    config = recipe(5, distillation=distillation, accumulate=2)
    step = jax.jit(make_train_step(graphdef, optax.sgd(1.0), config, teacher))
    batch = random_batch(1) | {"mask": MASK}
    state, metrics = step(create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=False), batch, teacher_weights)

    def by_hand(params):
        images = normalize(batch["image"], DATA.mean, DATA.std)
        model, (taught_logits, taught) = nnx.merge(graphdef, params), teach(teacher, teacher_weights, images)
        features = model.features(images)
        logits = model.classify(features)
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], 5), 0.1)
        each = jnp.stack(
            [
                optax.softmax_cross_entropy(logits, targets),
                prediction_loss(logits, taught_logits, 2.0),
                token_loss(features, taught),
            ]
        )
        terms = each @ MASK / jnp.sum(MASK)
        return jnp.sum(terms * jnp.array([0.7, 0.3, 0.4])), terms

    graded = jax.value_and_grad(by_hand, has_aux=True)
    (loss, terms), gradient = jax.jit(graded)(params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation_loss"], terms[1], rtol=1e-4)
    np.testing.assert_allclose(metrics["token_loss"], terms[2], rtol=1e-5)
    assert terms[1] > 1e-4 and terms[2] > 1e-4
    check = lambda new, old, moved: np.testing.assert_allclose(new, old - moved, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(check, state.params, params, gradient)


def test_a_teacher_comes_with_its_weights(distilled):
    graphdef, params, teacher, teacher_weights, _ = distilled
    state = create_state(params, {}, optax.sgd(1.0), seed=0, with_ema=False)
    with pytest.raises(InputError, match="teacher"):
        make_train_step(graphdef, optax.sgd(1.0), recipe(5), teacher)(state, random_batch())
    with pytest.raises(InputError, match="teacher"):
        make_train_step(graphdef, optax.sgd(1.0), recipe(5))(state, random_batch(), teacher_weights)


@pytest.mark.slow
def test_eight_devices(root):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def check_devices():
    """With all that a step can do: images change places with their partners, gradients are summed, nothing else."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "fsdp"))
    by_image, replicated = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ([("data", "fsdp")], [])
    )
    sizes = dict(num_classes=5, img_size=8, patch_size=4, embed_dim=16, depth=2, d_state=4)
    pruning = Pruning(after_blocks=(1,), keep_ratio=0.5)
    model = create_model("vim_tiny", pruning=pruning, drop_path=0.5, **sizes)
    dense = create_model("vim_tiny", rngs=nnx.Rngs(1), **sizes)
    config = recipe(5, augment=ALL, distillation=DistillationConfig(teacher="given", token_weight=0.4), accumulate=2)
    optimizer = optax.sgd(1.0)
    step = make_train_step(nnx.graphdef(model), optimizer, config, nnx.graphdef(dense))
    state = create_state(weights_of(model), {}, optimizer, seed=3, with_ema=False)
    batch, weights = random_batch(1, size=4 * DEVICES), weights_of(dense)
    batch["mask"] = batch["mask"].at[3].set(0)
    split = jax.device_put(state, replicated), jax.device_put(batch, by_image), jax.device_put(weights, replicated)
    program = jax.jit(step, out_shardings=(replicated, replicated)).lower(*split).compile()
    collective = r" (all-gather|all-to-all|reduce-scatter|all-reduce|collective-permute)(?:-start)?\("
    assert set(re.findall(collective, program.as_text())) == {"all-reduce", "collective-permute"}
    got, expected = program(*split), jax.jit(step)(state, batch, weights)
    assert_same_step(got, expected)
    print("same")


if __name__ == "__main__":
    check_devices()
