"""The schedule at its corners, for short runs too, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from top_jax.config import OptimizerConfig
from top_jax.models import abstract_model
from top_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-5, warmup_learning_rate=1e-6, warmup_epochs=2.0)


def schedule(config=CONFIG, *, batch_size=64, total_steps=100, steps_per_epoch=10.0):
    rate = learning_rate_schedule(
        config, batch_size=batch_size, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    return lambda step: round(float(rate(step)), 9)  # float32 inside


def test_schedule():
    rate = schedule()
    assert rate(0) == pytest.approx(1e-6)
    assert rate(10) == pytest.approx((1e-6 + 1e-3) / 2)
    assert rate(20) == pytest.approx(1e-3)  # two epochs
    assert rate(60) == pytest.approx((1e-3 + 1e-5) / 2)  # half of the cosine
    assert rate(100) == pytest.approx(1e-5)
    values = [float(rate(step)) for step in range(101)]
    assert np.all(np.diff(values[:21]) > 0) and np.all(np.diff(values[20:]) < 0)


@pytest.mark.parametrize(
    ("total_steps", "expected"), [(1, [1e-3]), (2, [1e-6, 1e-3]), (3, [1e-6, 1e-3, (1e-3 + 1e-5) / 2])]
)
def test_short_runs(total_steps, expected):
    """The warm-up takes at most half of the steps, so every run comes to the peak."""
    rate = schedule(total_steps=total_steps)
    assert [float(rate(step)) for step in range(total_steps)] == pytest.approx(expected)
    assert rate(total_steps) == pytest.approx(1e-5)


def test_scaled_by_the_batch():
    rate = schedule(OptimizerConfig(**{**vars(CONFIG), "reference_batch_size": 512}), batch_size=1024)
    assert rate(20) == pytest.approx(2e-3)
    assert rate(0) == pytest.approx(1e-6) and rate(100) == pytest.approx(1e-5)  # never scaled
    assert schedule(batch_size=1024)(20) == pytest.approx(1e-3)


def test_no_warmup():
    rate = schedule(OptimizerConfig(**{**vars(CONFIG), "warmup_epochs": 0.0}))
    assert rate(0) == pytest.approx(1e-3)


def params_of(name, **sizes):
    model = abstract_model(name, img_size=32, depth=2, embed_dim=32, **sizes)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def names(tree, wanted):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, value in leaves if value == wanted}


def test_decay_mask_of_vim():
    """Every parameter, by name."""
    mask = decay_mask(params_of("vim_tiny", d_state=4))
    directions = [f"blocks.{block}.mixer.{way}" for block in (0, 1) for way in ("forward", "backward")]
    assert names(mask, True) == {
        "patch_embed.proj.kernel",
        "head.kernel",
        *(f"blocks.{block}.mixer.{name}.kernel" for block in (0, 1) for name in ("in_proj", "out_proj")),
        *(f"{way}.{name}" for way in directions for name in ("conv_kernel", "x_proj.kernel", "dt_proj.kernel")),
    }
    assert names(mask, False) == {
        "patch_embed.proj.bias",
        "cls_token",
        "pos_embed",
        "norm.scale",
        "head.bias",
        "blocks.0.norm.scale",
        "blocks.1.norm.scale",
        *(f"{way}.{name}" for way in directions for name in ("conv_bias", "dt_bias", "A_log", "D")),
    }


def test_decay_mask_of_plain_mamba():
    """Its convolutions decay as its linear layers do; nothing of BatchNorm does."""
    mask = decay_mask(params_of("plain_mamba_l1", d_state=4, layers_with_dwconv=(0,)))
    mixers, stem = [f"blocks.{block}.mixer" for block in (0, 1)], ("patch_embed.stem", "patch_embed.convs.0")
    linear = ("in_proj", "x_proj", "dt_proj", "out_proj")
    assert names(mask, True) == {
        *(f"{name}.conv.kernel" for name in stem),
        "patch_embed.proj.kernel",
        "head.kernel",
        *(f"{mixer}.{name}.kernel" for mixer in mixers for name in linear),
        *(f"{mixer}.conv_kernel" for mixer in mixers),
        "blocks.0.tail.kernel",
    }
    norms = ("norm", "blocks.0.norm", "blocks.1.norm", "blocks.0.tail.norm", *(f"{name}.norm" for name in stem))
    assert names(mask, False) == {
        "pos_embed",
        "patch_embed.proj.bias",
        "head.bias",
        *(f"{norm}.{name}" for norm in norms for name in ("scale", "bias")),
        *(f"{mixer}.{name}.bias" for mixer in mixers for name in linear if name != "x_proj"),
        *(f"{mixer}.{name}" for mixer in mixers for name in ("conv_bias", "A_log", "D", "direction_Bs")),
    }


def test_decay_mask_of_deit():
    mask = decay_mask(params_of("deit_tiny", num_heads=2))
    linear = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    linear += ["patch_embed.proj", "head"]
    norms = ["norm", *(f"blocks.{block}.{name}" for block in (0, 1) for name in ("norm1", "norm2"))]
    assert names(mask, True) == {f"{name}.kernel" for name in linear}
    assert names(mask, False) == {
        "cls_token",
        "pos_embed",
        *(f"{name}.bias" for name in linear),
        *(f"{name}.{which}" for name in norms for which in ("scale", "bias")),
    }


def test_decay_acts_by_the_mask():
    """With no gradient a step is lr x decay x parameter, where it decays."""
    matrices = ("kernel", "A_log", "pos_embed")
    params = {"block": {name: jnp.ones((2, 3)) for name in matrices} | {"bias": jnp.ones(3)}}
    config = OptimizerConfig(weight_decay=0.5)
    optimizer = make_optimizer(config, lambda step: 0.1)
    updates = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])(params)
    expected = {"kernel": -0.05, "A_log": 0.0, "pos_embed": 0.0, "bias": 0.0}
    for name, update in updates["block"].items():
        np.testing.assert_allclose(update, expected[name], rtol=1e-6)


def test_clip():
    """The direction stays and the norm becomes clip_norm, before AdamW: its first moment shows it."""
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    grads = {"w": jnp.full((2, 2), 3.0), "v": jnp.full((2, 2), 4.0)}  # norm 10
    for clip_norm, scale in ((1.0, 0.1), (20.0, 1.0), (None, 1.0)):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm, b1=0.5), lambda step: 0.1)
        _, state = jax.jit(lambda params, opt=optimizer: opt.update(grads, opt.init(params), params))(params)
        moments = [leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")]
        np.testing.assert_allclose(moments[0].mu["w"], 0.5 * 3.0 * scale, rtol=1e-6)
        np.testing.assert_allclose(moments[0].mu["v"], 0.5 * 4.0 * scale, rtol=1e-6)
