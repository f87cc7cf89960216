"""What ViM guarantees besides its outputs: modes, dtypes, transformations, sizes, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy, relative_error
from flax import nnx

from top_jax.errors import InputError
from top_jax.models import Vim, create_model, model_config
from top_jax.models.layers import DropPath, causal_conv1d
from top_jax.models.weights import shapes_only
from top_jax.pruning import Pruning

FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def forward(quick_jit):
    return quick_jit(lambda model, images: model(images))


@pytest.mark.parametrize("reverse", [False, True])
def test_causal_conv1d(reverse):
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 3), (4, 3), (3,)))
    want = np.zeros_like(x)
    for t in range(7):
        for back in range(4):  # `back` tokens ago in the scan
            source = t + back if reverse else t - back
            if 0 <= source < 7:
                want[:, t] += kernel[3 - back] * x[:, source]
    got = jax.jit(causal_conv1d, static_argnames="reverse", compiler_options=FAST)(x, kernel, bias, reverse=reverse)
    np.testing.assert_allclose(got, want + bias, atol=1e-6)


def test_created_in_eval_mode_with_float32_parameters():
    model = nnx.eval_shape(lambda: create_model("vim_tiny", depth=2, drop_path=0.5, dtype="bfloat16"))
    assert model.drop_path.deterministic and all(block.drop_path.deterministic for block in model.blocks)
    assert {param.dtype for param in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    model.train()
    assert not any(block.drop_path.deterministic for block in model.blocks)


def test_seed_decides_the_weights():
    def cls_token(seed):
        return create_model("vim_tiny", depth=1, embed_dim=8, img_size=16, rngs=nnx.Rngs(seed)).cls_token[...]

    first, again, other = (jax.jit(cls_token, static_argnums=0, compiler_options=FAST)(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bfloat16(make_model, images, forward):
    model, half = make_model(depth=1), make_model(depth=1, dtype="bfloat16")
    logits = forward(half, images)
    assert logits.dtype == jnp.float32
    error = relative_error(logits, forward(model, images))
    assert 1e-5 < error < 0.05  # computed in bfloat16, and correctly
    tokens = jax.eval_shape(lambda: half.embed(images))
    after, evidence = jax.eval_shape(lambda tokens: half.blocks[0].mix(tokens, None, None), tokens)
    assert tokens.x.dtype == after.x.dtype == jnp.bfloat16
    assert tokens.residual.dtype == after.residual.dtype == jnp.float32
    assert {array.dtype for array in evidence.values()} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda: half.features(images)).x.dtype == jnp.float32


def test_gradient_over_a_closed_over_model(make_model, images, forward):
    model = make_model(depth=1)
    grad = jax.jit(jax.grad(lambda images: jnp.sum(model(images)[0])), compiler_options=FAST)(images)
    assert grad.shape == images.shape and np.abs(grad[0]).max() > 0
    np.testing.assert_array_equal(grad[1:], 0)  # no gradient for the other images


@pytest.mark.slow
def test_remat_changes_no_number(make_model, images):
    plain, remat = (make_model(depth=1, remat=flag) for flag in (False, True))
    loss = lambda model, images: jnp.sum(jnp.square(model(images)))  # noqa: E731
    assert "remat" in str(jax.make_jaxpr(loss)(remat, images))
    assert "remat" not in str(jax.make_jaxpr(loss)(plain, images))
    graded = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
    (value, grads), (again, regrads) = graded(plain, images), graded(remat, images)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for want, got in zip(jax.tree.leaves(grads), jax.tree.leaves(regrads), strict=True):
        assert relative_error(got, want) < 1e-5


def test_no_effect_keeps_calls_off_the_fast_dispatch(make_model, images):
    """An effect, such as a traced check of positions, would make JAX dispatch every call from Python."""
    model = make_model(pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="decay"))
    assert not jax.make_jaxpr(lambda images: model(images))(images).effects


def test_drop_path_rates():
    config = model_config("vim_tiny", depth=5, drop_path=0.2)
    rates = [config.drop_path_rate(index) for index in range(5)]
    np.testing.assert_allclose(rates, [0, 0, 0.05, 0.1, 0.15], rtol=1e-6)  # the official code's
    model = shapes_only(lambda rngs: Vim(config, rngs=rngs))
    assert [block.drop_path.rate for block in model.blocks] == rates and model.drop_path.rate == 0.2


def test_drop_path_draws_per_image():
    drop, keys = DropPath(0.25, index=3), jax.random.split(jax.random.key(0), 4000)
    run, x = in_numpy(lambda drop, x, keys: drop(x, keys)), np.ones((4000, 2, 3), np.float32)
    y = run(drop, x, keys)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))  # whole images
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(run(drop, x[7:9], keys[7:9]), y[7:9])  # independent of the batch
    assert (run(DropPath(0.25, index=4), x, keys) != y).any()  # every block draws separately
    drop.set_attributes(deterministic=True)
    np.testing.assert_array_equal(run(drop, x, None), x)


def test_train_mode(make_model, images, forward):
    model = make_model(drop_path=0.6)
    want = forward(model, images)
    model.train()
    with pytest.raises(InputError, match="keys="):
        model(images)
    keys = jax.random.split(jax.random.key(1), 3)
    train = jax.jit(lambda model, images, keys: model(images, keys), compiler_options=FAST)
    first, again, other = train(model, images, keys), train(model, images, keys), train(model, images, keys[::-1])
    np.testing.assert_array_equal(first, again)
    assert relative_error(first, want) > 1e-3 and relative_error(other, first) > 1e-3
    alone = np.array(images)
    alone[1:] = 0
    np.testing.assert_array_equal(np.asarray(train(model, jnp.asarray(alone), keys))[0], np.asarray(first)[0])
    model.eval()
    np.testing.assert_array_equal(forward(model, images), want)


@pytest.mark.parametrize(
    "sizes, grid",
    [
        (dict(img_size=(8, 20)), (2, 5)),
        (dict(img_size=(20, 8), patch_size=8, stride=4), (4, 1)),
        (dict(img_size=16, patch_size=8), (2, 2)),  # the stride follows the patch size
        (dict(img_size=16, stride=2), (7, 7)),
    ],
)
def test_sizes(sizes, grid, make_model):
    model = make_model(**sizes)
    height, width = model.config.img_size
    assert model.config.grid == grid and model.pos_embed.shape == (1, grid[0] * grid[1] + 1, 16)
    assert model.patch_embed.proj.kernel.shape == (model.config.patch_size, model.config.patch_size, 3, 16)
    features = jax.eval_shape(model.features, jnp.zeros((2, height, width, 3)))
    assert features.x.shape == (2, grid[0] * grid[1], 16)


def test_patches_are_cut_row_by_row(make_model):
    model, patches = make_model(img_size=(8, 12)), in_numpy(lambda model, image: model.patch_embed(image))
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        image = np.zeros((1, 8, 12, 3), np.float32)
        image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1.0
        touched = np.abs(patches(model, image) - patches(model, np.zeros_like(image))).max((0, 2))
        assert touched.argmax() == place and (touched > 0).sum() == 1


def test_unknown_model_and_override():
    with pytest.raises(InputError, match="'vim_huge' .* vim_tiny"):
        create_model("vim_huge")
    with pytest.raises(InputError, match="vim_tiny .* 'num_heads'"):
        create_model("vim_tiny", num_heads=3)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(img_size=30, patch_size=8), r"\(30 - 8\) .* 24 or 32"),
        (dict(img_size=(32, 33), patch_size=8, stride=4), r"\(33 - 8\)"),
        (dict(img_size=4, patch_size=8), "8 or 16"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        create_model("vim_tiny", **sizes)


def test_images_of_another_size(make_model):
    with pytest.raises(InputError, match=r"\(2, 8, 16, 3\).*\[B, 16, 16, 3\]"):
        make_model()(jnp.zeros((2, 8, 16, 3)))
