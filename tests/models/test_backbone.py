"""What all backbones guarantee."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from small_models import model_of_shapes, random_model

from top_jax.errors import InputError
from top_jax.models import create_model
from top_jax.models.weights import statistics_of, weights_of
from top_jax.pruning import Evit, Merging, Pruning

FAMILIES = {
    "vim_tiny": dict(d_state=3),
    "plain_mamba_l1": dict(d_state=3),
    "deit_tiny": dict(num_heads=2),
}
SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_classes=5)


def make(name: str, **overrides):
    return random_model(name, scale=0.3, **{**SMALL, **FAMILIES[name], **overrides})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_remat_of_a_closed_over_model(name, images, quick_jit):
    """Works under jit and grad with the model captured by the compiled function."""
    plain, remat = make(name, depth=1), make(name, depth=1, remat=True)
    grads = [quick_jit(jax.grad(lambda x, model=model: jnp.sum(model(x) ** 2)))(images) for model in (plain, remat)]
    assert relative_error(grads[1], grads[0]) < 1e-5
    assert relative_error(quick_jit(lambda x: remat(x))(images), quick_jit(lambda x: plain(x))(images)) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_call_changes_nothing_in_eval_mode_and_only_statistics_in_train_mode(name, remat, images, quick_jit):
    model = make(name, remat=remat)

    def run(model, images):
        model(images)
        return weights_of(model)

    before = weights_of(model)
    jax.tree.map(np.testing.assert_array_equal, quick_jit(run)(model, images), before)
    model.train()
    after, statistics = quick_jit(run)(model, images), statistics_of(model)
    moved = {path for path, same in _equal(after, before).items() if not same}
    assert moved == set(_equal(statistics, statistics)) and bool(moved) == (name == "plain_mamba_l1")


def _equal(first, second) -> dict[str, bool]:
    leaves = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True)
    return {jax.tree_util.keystr(path): bool(np.array_equal(a, b)) for (path, a), b in leaves}


@pytest.mark.parametrize(
    ("name", "pruning", "message"),
    [
        (
            "deit_tiny",
            Pruning(after_blocks=(1,)),
            "score='clip'",
        ),
        (
            "vim_tiny",
            Evit(after_blocks=(1,)),
            "score='attention'",
        ),
        ("plain_mamba_l1", Evit(after_blocks=(1,)), "score='attention'"),
        ("plain_mamba_l1", Merging(after_blocks=(1,), keep_ratio=0.4), "keep_ratio=0.4"),
    ],
)
def test_a_reduction_that_the_model_cannot_do(name, pruning, message):
    with pytest.raises(InputError, match=message):
        make(name, pruning=pruning)


def test_no_schedule_needs_no_evidence():
    assert make("deit_tiny", pruning=Pruning()).schedule == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_fit_every_reduction(name):
    """A reduction neither adds nor removes parameters."""
    score = "attention" if name == "deit_tiny" else "clip"
    reductions = (
        Pruning(after_blocks=(1,), keep_ratio=0.5, score=score),
        Evit(after_blocks=(1,), score=score),
        Merging(),
    )
    shapes = lambda pruning: jax.tree.map(  # noqa: E731
        lambda a: a.shape, weights_of(model_of_shapes(name, **SMALL, **FAMILIES[name], pruning=pruning))
    )
    assert all(shapes(reduction) == shapes(None) for reduction in reductions)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("vim_tiny", dict(depth=0), "depth=0; needed: a whole number from 1"),
        ("vim_tiny", dict(depth=10**8), "depth=100000000; needed: a whole number from 1"),
        ("vim_tiny", dict(embed_dim=10**9), "embed_dim=1000000000; needed"),
        ("deit_tiny", dict(num_classes=10**12), "num_classes=1000000000000; needed"),
        ("vim_tiny", dict(embed_dim="16"), "embed_dim='16'; needed: a whole number"),
        ("vim_tiny", dict(num_classes=True), "num_classes=True; needed"),
        ("plain_mamba_l1", dict(d_state=0), "d_state=0; needed"),
        ("plain_mamba_l1", dict(num_convs_patch_embed=-1), "num_convs_patch_embed=-1"),
        ("deit_tiny", dict(mlp_ratio=0), "mlp_ratio=0"),
        ("deit_tiny", dict(img_size="16"), "img_size='16'"),
        ("deit_tiny", dict(img_size=16.0), "img_size=16.0"),
        ("vim_tiny", dict(drop_path=1.5), "drop_path=1.5"),
        ("vim_tiny", dict(dtype="foo"), "dtype='foo'"),
        ("vim_tiny", dict(dtype="int32"), "dtype='int32'"),
        ("plain_mamba_l1", dict(implementation="foo"), "implementation='foo'"),
        ("vim_tiny", dict(pruning="foo"), "pruning='foo'"),
        ("vim_tiny", dict(pruning=Pruning), "pruning=<class"),
        (
            "deit_tiny",
            dict(pruning=Merging(alignment="decay")),
            "alignment='decay'",
        ),
    ],
)
def test_settings_out_of_range(name, sizes, message, without_type_checks):
    with pytest.raises(InputError, match=message):
        create_model(name, **{**SMALL, **FAMILIES[name], **sizes})


def test_inputs_that_are_not_images_and_keys(images, without_type_checks):
    model = make("vim_tiny", drop_path=0.1)
    with pytest.raises(InputError, match="uint8"):
        model(images.astype(jnp.uint8))
    model.train()
    with pytest.raises(InputError, match=r"\(2,\) for 3 images"):
        model(images, jax.random.split(jax.random.key(0), 2))
