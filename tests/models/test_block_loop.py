"""The loop over equal blocks in train mode, compared with the same blocks one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from comparison import relative_error
from flax import nnx
from small_models import random_model

from top_jax.models.block_loop import groups
from top_jax.models.deit import DeitBlock
from top_jax.models.weights import split_weights, statistics_of, weights_of
from top_jax.pruning import Merging, Pruning

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=4, num_classes=3, drop_path=0.4)
DECAY = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="decay")
CASES = {
    "vim_decay": ("vim_tiny", dict(d_state=3, pruning=DECAY)),
    "vim_xla": ("vim_tiny", dict(d_state=3, implementation="xla")),
    "vim_remat": ("vim_tiny", dict(d_state=3, remat=True)),
    "plain_mamba_tails": ("plain_mamba_l1", dict(d_state=3, layers_with_dwconv=(1, 2, 3))),
    "plain_mamba_xla": ("plain_mamba_l1", dict(d_state=3, implementation="xla")),
    "deit_merged": ("deit_tiny", dict(num_heads=2, pruning=Merging(after_blocks=(1,), keep_ratio=0.7))),
}
QUICK = ("vim_decay",)


def training(name: str, **settings):
    if not name.startswith("deit"):
        settings = {"implementation": "reference", **settings}  # it compiles fastest
    model = random_model(name, scale=0.3, **SMALL, **settings)
    model.train()
    return model


def one_by_one(model, images, keys):
    """Classifies without a loop: `watch` sees every block."""
    return model.classify(model.features(images, keys, watch=lambda run: None))


def loss_of(model, forward, images):
    """Returns the loss as a function of the parameters, with the moved statistics beside it."""
    graphdef, keys = nnx.graphdef(model), jax.random.split(jax.random.key(3), len(images))
    params, statistics = split_weights(weights_of(model), like=statistics_of(model))

    def loss(params):
        again = nnx.merge(graphdef, params, statistics)
        return jnp.sum(jnp.square(forward(again, images, keys))), statistics_of(again)

    return loss, params


def count(text: str, equation: str) -> int:
    return text.count(f" {equation}[")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_loop_computes_what_its_blocks_do(case, images, quick_jit):
    name, settings = CASES[case]
    model = training(name, **settings)
    graded = []
    for forward in (one_by_one, lambda model, images, keys: model(images, keys)):
        loss, params = loss_of(model, forward, images)
        graded.append(quick_jit(jax.value_and_grad(loss, has_aux=True))(params))
    ((value, statistics), grads), ((again, restatistics), regrads) = graded
    assert relative_error(again, value) < 1e-6
    for want, got in zip(jax.tree.leaves((grads, statistics)), jax.tree.leaves((regrads, restatistics)), strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("name", ["vim_tiny", pytest.param("plain_mamba_l1", marks=pytest.mark.slow)])
def test_a_loop_keeps_little_and_runs_no_scan_again(name, images):
    model = training(name, d_state=3, implementation="pallas_interpret")
    kept, kernels = [], []
    for forward in (one_by_one, lambda model, images, keys: model(images, keys)):
        loss, params = loss_of(model, forward, images)
        pull_back = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params, has_aux=True)[1], params)
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back)))
        kernels.append(count(str(jax.make_jaxpr(jax.grad(lambda p, loss=loss: loss(p)[0]))(params)), "pallas_call"))
    bodies = {"vim_tiny": 1, "plain_mamba_l1": 2}[name]  # PlainMamba's first layer differs from the others
    scans = {"vim_tiny": 2, "plain_mamba_l1": 1}[name]  # ViM's two directions have their own launches
    assert kernels == [2 * scans * SMALL["depth"], 2 * scans * bodies]
    assert kept[1] < 0.9 * kept[0]  # half at full size, where the scan's saved states are a smaller part


def test_eval_mode_has_no_loop(images):
    model = random_model("deit_tiny", scale=0.3, **SMALL, num_heads=2)
    program = str(jax.make_jaxpr(lambda model, images: model(images))(model, images))
    assert count(program, "scan") == count(program, "checkpoint") == 0


def test_stages_are_those_of_single_blocks(images, quick_jit):
    """A stage ends a loop, so blocks 1 to 3 and block 4 are apart."""
    model, keys = training("deit_tiny", num_heads=2), jax.random.split(jax.random.key(3), len(images))
    run = lambda watch: quick_jit(lambda m: m.features(images, keys, stages=(3, 4), watch=watch))(model)  # noqa: E731
    for want, got in zip(jax.tree.leaves(run(lambda run: None)), jax.tree.leaves(run(None)), strict=True):
        assert relative_error(got, want) < 1e-6


def test_groups():
    """Only equal neighbours join, at least three, never across a cut or a stage."""
    blocks = training("plain_mamba_l1", d_state=3, layers_with_dwconv=(3,)).blocks
    numbers = lambda **limits: [[*group] for group in groups(blocks, **limits)]  # noqa: E731
    assert numbers(alone=(), last=()) == [[1, 2, 3], [4]]
    assert numbers(alone=(2,), last=()) == numbers(alone=(), last=(2,)) == [[1], [2], [3], [4]]


def test_blocks_of_the_user_stay_alone():
    """They may have variables of other kinds, count their calls, or keep what they compute."""

    class Count(nnx.Variable):
        pass

    class Own(DeitBlock):
        pass

    blocks = training("deit_tiny", num_heads=2).blocks
    blocks[0].calls = Count(jnp.zeros(()))
    assert [[*group] for group in groups(blocks, alone=(), last=())] == [[1], [2, 3, 4]]
    own = [nnx.clone(block) for block in blocks[1:]]
    for block in own:
        block.__class__ = Own
    assert [[*group] for group in groups(own, alone=(), last=())] == [[1], [2], [3]]


def test_draws_of_drop_paths_in_64_bits(images):
    with jax.enable_x64(True):
        model, keys = training("deit_tiny", num_heads=2), jax.random.split(jax.random.key(3), len(images))
        logits = jax.jit(lambda model: (one_by_one(model, images, keys), model(images, keys)))(model)
    assert relative_error(logits[1], logits[0]) < 1e-6
