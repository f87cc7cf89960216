"""The losses of distillation by hand, and on every family's own features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import random_model

from top_jax.models import Features, create_model
from top_jax.models.weights import weights_of
from top_jax.pruning import Evit, Merging, Pruning
from top_jax.training.distillation import prediction_loss, teach, token_loss

SIZE = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_classes=5)
CASES = {
    "vim_tiny": (Pruning(after_blocks=(1,), keep_ratio=0.5), dict(d_state=4)),
    "plain_mamba_l1": (Merging(after_blocks=(1,), keep_ratio=0.5), dict(d_state=4)),
    "deit_tiny": (Evit(after_blocks=(1,), keep_ratio=0.5), dict(num_heads=2)),
}


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_prediction_loss_by_hand(temperature):
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    s, t = (softmax(np.asarray(logits, np.float64) / temperature) for logits in (student, teacher))
    expected = temperature**2 * (t * (np.log(t) - np.log(s))).sum(-1)
    loss = jax.jit(functools.partial(prediction_loss, temperature=temperature))
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(teacher, teacher), 0, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda logits: loss(logits, teacher).sum()))(student)
    np.testing.assert_allclose(gradient, temperature * (s - t), rtol=1e-4, atol=1e-6)


def features(x, positions, cls=None):
    source = jnp.zeros((x.shape[0], 6), jnp.int32)  # which no loss reads
    return Features(x, jnp.asarray(positions, jnp.int32), cls, source, (2, 3))


def by_hand(student, teacher):
    """Token by token."""
    losses = []
    for image in range(len(student.x)):
        pairs = [
            (student.x[image, k], teacher.x[image, place])
            for k, place in enumerate(np.asarray(student.positions[image]))
            if place >= 0
        ]
        if student.cls is not None:
            pairs.append((student.cls[image], teacher.cls[image]))
        losses.append(np.mean([np.mean((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs]) if pairs else 0.0)
    return losses


@pytest.mark.parametrize("with_class", [True, False])
def test_token_loss_by_hand(with_class):
    """Images that keep different places; one with a fused token, one with nothing else."""
    cls = (normal(3, 4, seed=2), normal(3, 4, seed=3)) if with_class else (None, None)
    student = features(normal(3, 2, 4), [[4, 1], [5, -1], [-1, -1]], cls[0])
    teacher = features(normal(3, 6, 4, seed=1), [range(6)] * 3, cls[1])
    np.testing.assert_allclose(token_loss(student, teacher), by_hand(student, teacher), rtol=1e-5)


@pytest.fixture(scope="module", params=CASES)
def taught(request):
    """A model, what it makes of images, and what its dense self teaches about them."""
    reduction, sizes = CASES[request.param]
    student = create_model(request.param, pruning=reduction, **SIZE, **sizes)
    dense = create_model(request.param, **SIZE, **sizes, drop_path=0.9)
    dense.train()  # teach does not mind
    quick = {"xla_backend_optimization_level": 0}

    def run(weights, images):
        model = nnx.merge(nnx.graphdef(student), weights)
        return model.features(images), teach(nnx.graphdef(dense), weights, images)

    return jax.jit(run, compiler_options=quick)(weights_of(student), normal(2, 16, 16, 3))


@pytest.mark.slow
def test_every_family(taught):
    """The student has half of the tokens, DeiT one fused; each differs from the teacher's at its own place."""
    student, (logits, teacher) = taught
    assert student.x.shape[1] < teacher.x.shape[1] == 16 and logits.shape == (2, 5)
    np.testing.assert_array_equal(teacher.positions, np.tile(np.arange(16), (2, 1)))
    loss = token_loss(student, teacher)
    np.testing.assert_allclose(loss, by_hand(student, teacher), rtol=1e-4)
    shifted = jnp.where(student.positions < 0, -1, (student.positions + 1) % 16)
    other = token_loss(Features(student.x, shifted, student.cls, student.source, student.grid), teacher)
    assert (np.asarray(other) > 1.1 * np.asarray(loss)).all() and (np.asarray(loss) > 0).all()


def test_no_gradient_reaches_the_teacher():
    model = random_model("deit_tiny", scale=0.3, **(SIZE | dict(depth=1)), num_heads=2)
    graphdef, weights = nnx.graphdef(model), weights_of(model)

    def loss(weights):
        logits, features = teach(graphdef, weights, normal(1, 16, 16, 3))
        return jnp.sum(logits) + jnp.sum(features.x)

    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(weights)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
