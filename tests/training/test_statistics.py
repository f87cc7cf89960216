"""BatchNorm's running statistics through training: what PyTorch would have, in every state, file and evaluation.

This file is also the program that is started on eight devices, where it trains on all of them and on one.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from top_jax.config import AugmentConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from top_jax.evaluation.accuracy import make_eval_step
from top_jax.models import create_model
from top_jax.models.layers import BatchNorm
from top_jax.models.weights import join_weights, split_weights, statistics_of, weights_of
from top_jax.training.checkpoints import Checkpoints
from top_jax.training.optimizer import make_optimizer
from top_jax.training.steps import create_state, make_train_step

pytestmark = pytest.mark.slow

DATA = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
TINY = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, d_state=4, layers_with_dwconv=(0,), num_classes=5)
BATCH, STEPS, DEVICES = 16, 3, 8
# Decay and rate large enough to be seen wherever they act.
RECIPE = OptimizerConfig(ema_decay=0.75, weight_decay=0.5)
quick_jit = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # noqa: E731


class Normed(nnx.Module):
    """BatchNorm on the pixels themselves, whose statistics can be computed by hand."""

    def __init__(self):
        self.norm = BatchNorm(3)
        self.head = nnx.Linear(3, 5, rngs=nnx.Rngs(0))

    def __call__(self, images, keys=None):
        return self.head(jnp.mean(self.norm(images), axis=(1, 2)))


def batch_of(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, 5, BATCH), jnp.int32),
        "mask": jnp.ones(BATCH, jnp.float32),
        "index": jnp.arange(BATCH, dtype=jnp.int32),
    }


def pixels(batch: dict[str, jax.Array], data: DataConfig = DATA) -> np.ndarray:
    return (np.asarray(batch["image"], np.float64) / 255 - data.mean) / data.std


def start(model: nnx.Module, recipe: OptimizerConfig = RECIPE, data: DataConfig = DATA) -> tuple[Any, Any]:
    """The compiled step of a model that nobody put into train mode, and its first state."""
    optimizer = make_optimizer(recipe, optax.constant_schedule(0.01))
    config = RunConfig(model=ModelConfig(num_classes=5), optimizer=recipe, data=data, augment=AugmentConfig(flip=False))
    step = quick_jit(make_train_step(nnx.graphdef(model), optimizer, config))
    params, stats = split_weights(weights_of(model), like=statistics_of(model))
    return step, create_state(params, stats, optimizer, seed=0, with_ema=recipe.ema_decay is not None)


def torch_update(running: dict[str, Any], x: np.ndarray) -> dict[str, Any]:
    """torch.nn.BatchNorm2d's documentation: momentum 0.1, the unbiased variance."""
    axes = tuple(range(x.ndim - 1))
    return {
        "mean": 0.9 * np.asarray(running["mean"]) + 0.1 * x.mean(axes),
        "var": 0.9 * np.asarray(running["var"]) + 0.1 * x.var(axes, ddof=1),
        "num_batches": running["num_batches"] + 1,
    }


def assert_close(got: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def assert_bit_equal(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def plain_mamba() -> Any:
    return create_model("plain_mamba_l1", **TINY)


@pytest.fixture(scope="module")
def trained(plain_mamba) -> Any:
    """The step of a PlainMamba and its states: the first, and after each of a few steps."""
    step, state = start(plain_mamba)
    states = [state]
    for seed in range(STEPS):
        states.append(step(states[-1], batch_of(seed))[0])
    return step, states


def test_by_hand(trained, plain_mamba):
    """The first BatchNorm of the stem sees a convolution of the images; AdamW, with decay, leaves it alone."""
    _, states = trained
    stem = lambda state: state.stats["patch_embed"]["stem"]["norm"]  # noqa: E731
    for seed, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        model = nnx.merge(nnx.graphdef(plain_mamba), before.params, before.stats)
        x = model.patch_embed.stem.conv(jnp.asarray(pixels(batch_of(seed)), jnp.float32))
        assert_close(stem(after), torch_update(stem(before), np.asarray(x, np.float64)), rtol=1e-4)
        assert abs(np.asarray(stem(after)["var"]) - np.asarray(stem(before)["var"])).min() > 1e-3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(states[-1].stats))


def test_every_layer_counts_its_batches(trained):
    _, states = trained
    for steps, state in enumerate(states):
        norms = jax.tree.leaves(state.stats, is_leaf=lambda node: "num_batches" in node)
        assert len(norms) == 3 and all(
            float(norm["num_batches"]) == steps for norm in norms
        )  # two of the stem, one tail
        assert all((np.asarray(norm["mean"]) != 0).all() == (steps > 0) for norm in norms)


def test_the_optimizer_has_parameters_only(trained):
    _, states = trained
    moments = next(leaf for leaf in jax.tree.leaves(states[-1].opt_state, is_leaf=_has_mu) if _has_mu(leaf))
    assert jax.tree.structure(moments.mu) == jax.tree.structure(states[0].params)
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(states[-1].params)}
    assert not paths & {path for path, _ in jax.tree_util.tree_leaves_with_path(states[-1].stats)}


def _has_mu(node: Any) -> bool:
    return hasattr(node, "mu")


def test_training_does_not_use_them(trained):
    """It normalises with the batch's own: with other running ones a step comes to the same parameters and loss."""
    step, states = trained
    other = dataclasses.replace(states[1], stats=jax.tree.map(lambda a: 3 * a + 1, states[1].stats))
    (after, metrics), (expected, expected_metrics) = step(other, batch_of(9)), step(states[1], batch_of(9))
    assert_bit_equal((after.params, after.opt_state), (expected.params, expected.opt_state))
    assert float(metrics.pop("stats_norm")) > float(expected_metrics.pop("stats_norm"))
    assert_bit_equal(metrics, expected_metrics)


def test_average(trained):
    """The statistics are averaged as the parameters are: ema_n = d ema_{n-1} + (1 - d) w_n, from the first weights."""
    _, states = trained
    expected = join_weights(states[0].params, states[0].stats)
    for state in states[1:]:
        weights = join_weights(state.params, state.stats)
        expected = jax.tree.map(lambda e, w: 0.75 * np.asarray(e) + 0.25 * np.asarray(w), expected, weights)
        assert_close(state.ema, expected)
        assert list(state.weights()) == ["params", "ema"] and state.weights()["ema"] is state.ema
        assert_bit_equal(state.weights()["params"], weights)
    variances = (tree["patch_embed"]["stem"]["norm"]["var"] for tree in (states[-1].ema, states[-1].stats))
    assert np.abs(np.subtract(*variances)).max() > 1e-2


def test_recomputed_blocks_move_them_too(trained):
    """`remat` runs a block again in the backward pass; its statistics move once all the same."""
    _, states = trained
    step, state = start(create_model("plain_mamba_l1", **TINY, remat=True))
    after, _ = step(state, batch_of(0))
    assert float(after.stats["blocks"][0]["tail"]["norm"]["num_batches"]) == 1
    assert_close(after.stats, states[1].stats)
    assert_close(after.params, states[1].params, rtol=1e-4, atol=1e-5)


def test_resumed_bit_by_bit(trained, tmp_path):
    """Saved after a step and read into a state of zeros, it goes on as if nothing had happened."""
    step, states = trained
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[2], {"batches": 2})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, states[0]))
    assert_bit_equal(restored, states[2])
    assert_bit_equal(step(restored, batch_of(2))[0], states[3])


def test_evaluation_uses_them(trained):
    """An image's logits do not depend on the batch around it, but on the statistics."""
    _, states = trained
    model = create_model("plain_mamba_l1", **TINY)
    model.train()  # evaluation does not mind
    step = make_eval_step(nnx.graphdef(model), DATA)
    weights = states[-1].weights()["params"]
    mask = {"mask": jnp.arange(BATCH) < 4}
    rest = batch_of(1)["image"].at[:4].set(batch_of(0)["image"][:4])
    expected, got = step(weights, batch_of(0) | mask), step(weights, batch_of(0) | mask | {"image": rest})
    assert_close(got, expected, rtol=1e-6)
    other = join_weights(states[-1].params, states[0].stats)
    assert abs(float(step(other, batch_of(0) | mask)["loss"] - expected["loss"])) > 1e-3


def test_micro_batches_in_order():
    """Each moves them once; image i is of micro-batch i mod 2."""
    model = Normed()
    step, state = start(model, OptimizerConfig(accumulate=2))
    batch = batch_of(0)
    batch["image"] = batch["image"].at[1::2].set(batch["image"][1::2] // 2)  # so that the order shows
    after, _ = step(state, batch)
    x, first = pixels(batch), state.stats["norm"]
    assert_close(after.stats["norm"], torch_update(torch_update(first, x[::2]), x[1::2]))
    other_way = torch_update(torch_update(first, x[1::2]), x[::2])
    assert np.abs(np.asarray(after.stats["norm"]["mean"]) - other_way["mean"]).min() > 1e-3


def test_masked_images_are_among_them():
    """The pixels of masked images count, their labels do not, as the step documents."""
    step, state = start(Normed())
    mask = {"mask": jnp.asarray(np.arange(BATCH) % 3 > 0, jnp.float32)}
    after, _ = step(state, batch_of(0) | mask)
    assert_close(after.stats["norm"], torch_update(state.stats["norm"], pixels(batch_of(0))))


def test_not_finite_is_seen_in_the_metrics():
    """A variance that overflows normalises everything to zero: loss, gradients and parameters do not show it."""
    data = dataclasses.replace(DATA, std=(1e-20,) * 3)
    step, state = start(Normed(), data=data)
    after, metrics = step(state, batch_of(0))
    assert not np.isfinite(after.stats["norm"]["var"]).any()
    shown = {name: bool(np.isfinite(value)) for name, value in metrics.items()}
    assert shown.pop("stats_norm") is False and all(shown.values())
    _, metrics = start(Normed())[0](state, batch_of(0))
    assert np.isfinite(metrics["stats_norm"])


def test_without_batch_norm():
    """Nothing is there, in the state, in the files and in the metrics."""
    model = create_model("vim_tiny", img_size=8, patch_size=4, embed_dim=16, depth=1, d_state=4, num_classes=5)
    step, state = start(model, OptimizerConfig())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert state.stats == {} and jax.tree.structure(state.weights()) == jax.tree.structure({"params": params})
    after, metrics = jax.eval_shape(step, state, batch_of(0))
    assert after.stats == {} and set(metrics) == {"loss", "accuracy", "grad_norm", "param_norm"}


@pytest.mark.parametrize("model", ["normed", "plain_mamba"])
def test_eight_devices(model, tmp_path):
    """The statistics are those of the whole batch; what eight devices saved one goes on from."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}",
    }
    done = subprocess.run(
        [sys.executable, __file__, model, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "same\n", done.stderr


def check_devices(model: nnx.Module, directory: Path) -> None:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert len(jax.devices()) == DEVICES
    step, first = start(model, dataclasses.replace(RECIPE, accumulate=2))
    results = {}
    for count in (1, DEVICES):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        by_image, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        state = jax.device_put(first, replicated)
        for seed in range(2):
            state, _ = step(state, jax.device_put(batch_of(seed), by_image))
        results[count] = jax.device_put(state, replicated)
    assert_close(results[DEVICES].stats, results[1].stats)
    assert_close(results[DEVICES].params, results[1].params, rtol=1e-4, atol=1e-5)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(results[DEVICES], {"batches": 2})
        checkpoints.wait()
        restored, _ = checkpoints.restore(results[1])
    assert_bit_equal(restored, results[DEVICES])
    assert all(leaf.sharding == results[1].step.sharding for leaf in jax.tree.leaves(restored))
    print("same")


if __name__ == "__main__":
    models = {"normed": Normed, "plain_mamba": lambda: create_model("plain_mamba_l1", **TINY)}
    check_devices(models[sys.argv[1]](), Path(sys.argv[2]))
