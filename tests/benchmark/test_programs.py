"""Whole models are timed as they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from top_jax.benchmark.programs import INFERENCE, ModelCase, make_train_step, time_model
from top_jax.benchmark.timing import Rounds
from top_jax.models import create_model
from top_jax.models.weights import split_weights, statistics_of, weights_of
from top_jax.pruning import Pruning

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "d_state": 2, "num_classes": 3}
CASE = ModelCase("vim_tiny", Pruning(after_blocks=(1,), keep_ratio=0.5), 2, "float32", overrides=SIZES)


def test_inference_rows():
    rows = time_model(CASE, Rounds(1, 0.0, 0.0), passes=(INFERENCE,))
    assert [(row["model"], row["variant"], row["pass"], row["implementation"]) for row in rows] == [
        ("vim_tiny", "dense", "inference", "xla"), ("vim_tiny", "pruned", "inference", "xla"),
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and row["compile_s"] >= 0 and row["program_mib"] > 0 for row in rows)
    assert rows[0]["gmacs_published"] > rows[1]["gmacs_published"]


@pytest.mark.slow
def test_training_rows(small, attentive):
    rows = time_model(ModelCase("deit_tiny", attentive, 2, "float32", overrides=small), Rounds(2, 60.0, 0.0))
    assert [row["pass"] for row in rows] == ["inference"] * 2 + ["train step"] * 2
    assert all(row["images_per_s"] > 0 for row in rows)


def test_one_that_cannot_run():
    with pytest.raises(ValueError, match="triton"):
        time_model(CASE._replace(implementation="triton"), Rounds(1, 0.0, 0.0), passes=(INFERENCE,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
def test_train_step_learns(name):
    """Statistics of BatchNorm move as in training, and the optimizer has nothing of them."""
    sizes = SIZES | ({"layers_with_dwconv": (0,)} if name == "plain_mamba_l1" else {})
    model, optimizer = create_model(name, **sizes), optax.adamw(1e-2)
    weights, like = weights_of(model), statistics_of(model)
    step = jax.jit(make_train_step(model, optimizer))
    images, labels = jax.random.normal(jax.random.key(0), (4, 8, 8, 3)), jnp.array([0, 1, 2, 0])
    momenta, losses = optimizer.init(split_weights(weights, like)[0]), []
    for _ in range(20):
        weights, momenta, loss = step(weights, momenta, images, labels)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(3), abs=0.5) and losses[-1] < losses[0] / 2
    assert {float(leaf) for leaf in jax.tree.leaves(split_weights(weights, like)[1]) if not leaf.ndim} <= {20.0}
