"""Models that are called outside of JAX transformations: compiled once, with the same results and side effects."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from jax import export
from jax.experimental import checkify
from small_models import random_model

from top_jax.errors import InputError
from top_jax.models import backbone
from top_jax.models.weights import statistics_of
from top_jax.pruning import Evit, Pruning

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_classes=5)
CASES = {
    "vim_tiny": dict(d_state=3, pruning=Pruning(after_blocks=(1,), keep_ratio=0.5)),
    "plain_mamba_l1": dict(d_state=3, layers_with_dwconv=(0,), pruning=Pruning(after_blocks=(1,), keep_ratio=0.5)),
    "deit_tiny": dict(num_heads=2, pruning=Evit(after_blocks=(1,), keep_ratio=0.5)),
}


# The calls of every family are compiled by the same code, and DeiT compiles fastest.
NAMES = [pytest.param(name, marks=() if name == "deit_tiny" else pytest.mark.slow) for name in CASES]


def make(name: str, scale: float = 0.3, **overrides):
    return random_model(name, scale=scale, **{**SMALL, **CASES[name], **overrides})


def compiled() -> int:
    return backbone._compiled._cache_size()  # pyright: ignore


@pytest.fixture
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize("name", NAMES)
def test_instances_share_a_program_and_none_is_kept_alive(name, images, quick_jit):
    models = [make(name, scale) for scale in (0.3, 0.4)]
    before = compiled()
    logits = [model(images) for model in models]
    assert compiled() == before + 1
    run = quick_jit(lambda model, images: model(images))
    for model, found in zip(models, logits, strict=True):
        assert relative_error(found, run(model, images)) < 1e-5
    assert not np.allclose(*logits)
    kept = [weakref.ref(models[0]), weakref.ref(models[0].blocks[0])]
    models.clear()
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_weights_that_changed_are_used_without_compiling_again(images):
    model = make("vim_tiny")
    first, before = model(images), compiled()
    for weight in (model.head.kernel, model.head.bias):
        weight[...] = 2 * weight[...]
    assert relative_error(model(images), 2 * first) < 1e-5 and compiled() == before


@pytest.mark.parametrize("name", NAMES)
def test_train_mode_draws_and_moves_what_it_does_operation_by_operation(name, images, keys, quick_jit):
    model = make(name, drop_path=0.6)
    model.train()
    start = statistics_of(model)

    def run(model, images, keys):
        return model(images, keys), statistics_of(model)

    logits, statistics = quick_jit(run)(model, images, keys)
    jax.tree.map(np.testing.assert_array_equal, statistics_of(model), start)
    found = model(images, keys)
    assert relative_error(found, logits) < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), statistics_of(model), statistics)
    assert bool(start) == (name == "plain_mamba_l1")
    for moved, before in zip(jax.tree.leaves(statistics_of(model)), jax.tree.leaves(start), strict=True):
        assert not np.array_equal(moved, before)
    assert not np.allclose(model(images, jax.random.split(jax.random.key(1), 3)), found)
    with pytest.raises(InputError, match="keys"):
        model(images)
    model.eval()
    assert not np.allclose(model(images), found)


@pytest.mark.parametrize("name", NAMES)
def test_watch_and_stages_get_values(name, images, quick_jit):
    model, runs = make(name), []
    features = model.features(images, stages=(1, 2), watch=runs.append)
    assert [run.number for run in runs] == [1, 2] and all(type(run.number) is int for run in runs)
    assert all(run.block is block for run, block in zip(runs, model.blocks, strict=True))
    assert not any(isinstance(leaf, jax.core.Tracer) for run in runs for leaf in jax.tree.leaves(run[2:]))
    assert runs[0].mixed.num_patches == 16 and runs[0].leaving.num_patches == runs[1].entering.num_patches < 16
    expected = quick_jit(lambda model, images: model.features(images, stages=(1, 2)))(model, images)
    assert jax.tree.structure(features) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), features, expected)


def test_inside_a_transformation_the_model_is_called_as_it_is(images):
    """No transformation meets a nested program, also where the model's arguments are no tracers."""
    model = make("deit_tiny")
    before = compiled()
    programs = (
        jax.make_jaxpr(lambda model, images: model(images))(model, images),
        jax.make_jaxpr(lambda scale: scale * model(images))(1.0),
        jax.make_jaxpr(jax.grad(lambda images: jnp.sum(model(images))))(images),
        jax.make_jaxpr(jax.vmap(lambda image: model(image[None])))(images),
        jax.make_jaxpr(lambda images: model.features(images))(images),
        jax.make_jaxpr(checkify.checkify(lambda images: model(images)))(images),
    )
    assert not any("_compiled" in str(program) for program in programs)
    assert jax.eval_shape(lambda images: model(images), images).shape == (3, 5)
    assert "_compiled" not in export.export(jax.jit(lambda images: model(images)))(images).mlir_module()
    assert compiled() == before


@pytest.mark.slow
def test_grad_and_vmap_outside_of_jit_agree_with_those_inside(images, quick_jit):
    model = make("deit_tiny", depth=1, pruning=None)
    loss = lambda images: jnp.sum(model(images) ** 2)  # noqa: E731
    assert relative_error(jax.grad(loss)(images), quick_jit(jax.grad(loss))(images)) < 1e-5
    assert relative_error(jax.vmap(lambda image: model(image[None])[0])(images), model(images)) < 1e-5


@pytest.mark.slow
def test_disable_jit_is_respected_and_settings_need_not_be_hashable(images):
    model = make("deit_tiny", depth=1, pruning=None)
    logits, before = model(images), compiled()
    with jax.disable_jit():
        assert relative_error(model(images), logits) < 1e-5
    assert compiled() == before
    model.notes = {"any": [1]}
    assert relative_error(model(images), logits) < 1e-5
