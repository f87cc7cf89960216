"""Whole models are timed as they are used."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from top_jax.benchmark.programs import (
    INFERENCE,
    make_batches,
    make_inference,
    make_train_step,
    random_weights,
    time_model,
)
from top_jax.benchmark.timing import Rounds
from top_jax.build import build_model
from top_jax.evaluation.segmentation import make_predict
from top_jax.models import create_model
from top_jax.models.weights import split_weights, statistics_of, weights_of
from top_jax.pruning import Pruning
from top_jax.training import segmentation

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "d_state": 2, "num_classes": 3}
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes most of the time
HALF = Pruning(after_blocks=(1,), keep_ratio=0.5)


def test_inference_rows():
    options = {"passes": (INFERENCE,), "dtype": "float32", **SIZES}
    rows = time_model("vim_tiny", HALF, 2, Rounds(1, 0.0, 0.0), **options)
    assert [(row["model"], row["variant"], row["pass"], row["implementation"]) for row in rows] == [
        ("vim_tiny", "dense", "inference", "xla"), ("vim_tiny", "pruned", "inference", "xla"),
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and row["compile_s"] >= 0 and row["program_mib"] > 0 for row in rows)
    assert rows[0]["gmacs_published"] > rows[1]["gmacs_published"]


@pytest.mark.slow
def test_training_rows(small, attentive):
    rows = time_model("deit_tiny", attentive, 2, Rounds(2, 60.0, 0.0), dtype="float32", **small)
    assert [row["pass"] for row in rows] == ["inference"] * 2 + ["train step"] * 2
    assert all(row["images_per_s"] > 0 for row in rows)


def test_one_that_cannot_run():
    with pytest.raises(ValueError, match="triton"):
        time_model("vim_tiny", HALF, 2, Rounds(1, 0.0, 0.0), implementation="triton", **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
def test_train_step_learns(name):
    """Statistics of BatchNorm move as in training, and the optimizer has nothing of them."""
    sizes = SIZES | ({"layers_with_dwconv": (0,)} if name == "plain_mamba_l1" else {})
    model, optimizer = create_model(name, **sizes), optax.adamw(1e-2)
    weights, like = weights_of(model), statistics_of(model)
    step = jax.jit(make_train_step(model, optimizer))
    images, labels = jax.random.normal(jax.random.key(0), (4, 8, 8, 3)), jnp.array([0, 1, 2, 0])
    keys = jax.random.split(jax.random.key(1), 4)
    momenta, losses = optimizer.init(split_weights(weights, like)[0]), []
    for _ in range(20):
        weights, momenta, metrics = step(weights, momenta, images, labels, keys)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(3), abs=0.5) and losses[-1] < losses[0] / 2
    assert {float(leaf) for leaf in jax.tree.leaves(split_weights(weights, like)[1]) if not leaf.ndim} <= {20.0}


@pytest.mark.slow
def test_segmenters_run_as_they_are_evaluated_and_trained(micro_segmenter):
    """Labels of a crop are those of evaluation; the loss is training's, with dropout and the batch's statistics."""
    model = build_model(micro_segmenter, HALF)
    weights, (batch, _) = random_weights(model), make_batches(model, 2)
    images, labels, keys = batch
    assert (images.shape, labels.shape, labels.dtype) == ((2, 32, 32, 3), (2, 32, 32), jnp.uint8)
    found = quick_jit(make_inference(model))(weights, images)
    np.testing.assert_array_equal(found, make_predict(model)(weights, images, (32, 32)))

    nnx.update(model, weights)
    model.train()
    wanted = quick_jit(lambda m, *arguments: segmentation.losses(m, *arguments, aux_weight=0.4))(model, *batch)
    optimizer = optax.adam(1e-2)  # moves what has a gradient, however small
    step = quick_jit(make_train_step(model, optimizer))
    params, _ = split_weights(weights, statistics_of(model))
    new, _, metrics = step(weights, optimizer.init(params), *batch)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(np.mean(value)) for name, value in wanted.items()}, rel=1e-5
    )
    still = {path for path, leaf in flatten_dict(new).items() if (leaf == flatten_dict(weights)[path]).all()}
    assert still - {("neck", "up1", "bias")} == {("backbone", "norm", "scale")}  # one is normalised away, one not read
    _, _, other = step(weights, optimizer.init(params), images, labels, keys[::-1])
    assert float(other["loss"]) != float(metrics["loss"])  # other channels are dropped
