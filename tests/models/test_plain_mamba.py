"""PlainMamba against what the official code computed (tests/fixtures/README.md), and what else it guarantees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from small_models import model_of_shapes

from top_jax.convert.key_maps import official_keys
from top_jax.errors import InputError
from top_jax.models import create_model, model_config

# Relative to the largest value. float32 against float64 gives 1e-6 in the official code itself.
FORWARD, GRADIENT = 1e-5, 1e-4


def by_official_key(model, values) -> dict[str, np.ndarray]:
    """Returns a pytree like the model's weights as {official key: PyTorch-shaped array}."""
    flat = dict(nnx.to_flat_state(values))
    return {
        key.torch: key.layout.to_torch(np.asarray(flat[key.ours][...]))
        for key in official_keys(model.config)
        if key.ours in flat
    }


@pytest.fixture(
    scope="module", params=[pytest.param("plain_mamba_micro", marks=pytest.mark.slow), "plain_mamba_nonsquare"]
)
def official(request, official_case):
    return official_case(request.param)


@pytest.fixture(scope="module")
def nonsquare(official_case):
    return official_case("plain_mamba_nonsquare")


@pytest.fixture(scope="module")
def computed(official, quick_jit):
    """((loss, (logits, features)), (gradient by weight, by image)) of sum(logits * grad_weight)."""

    def loss(model, image):
        features = model.features(image, stages=tuple(range(1, model.config.depth + 1)))
        logits = model.classify(features)
        return jnp.sum(logits * official["grad_weight"][None]), (logits, features)

    graded = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return graded(official.build(), jnp.asarray(official.image))


def test_logits_and_tokens_after_every_block(official, computed):
    (_, (logits, features)), _ = computed
    assert relative_error(logits, official["logits"]) < FORWARD
    assert relative_error(features.x, official["tokens"]) < FORWARD
    assert len(features.stages) == len(official["after_block"])
    for stage, want in zip(features.stages, official["after_block"], strict=True):
        assert relative_error(stage.x, want) < FORWARD


def test_gradients(official, computed):
    _, (model, image) = computed
    assert relative_error(image, official.grad_image) < GRADIENT
    gradients = by_official_key(model, nnx.state(model, nnx.Param))
    assert official.gradients.keys() <= gradients.keys() and len(official.gradients) >= 4
    errors = {name: relative_error(gradients[name], want) for name, want in official.gradients.items()}
    assert max(errors.values()) < GRADIENT, errors


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_train_mode(remat, nonsquare, quick_jit):
    """BatchNorm's batch statistics and the running ones after a step."""

    def forward(model, image):
        logits = model(image)
        return logits, nnx.state(model, nnx.BatchStat)

    model = nonsquare.build(remat=remat)
    model.train()
    logits, statistics = quick_jit(forward)(model, jnp.asarray(nonsquare.image))
    assert relative_error(logits, nonsquare["train_logits"]) < FORWARD
    got, want = by_official_key(model, statistics), nonsquare.under("after_train/")
    assert got.keys() == want.keys() and len(want) == 12
    for name, array in want.items():
        assert relative_error(got[name], array) < FORWARD, name


@pytest.mark.slow  # it judges the fixture
@pytest.mark.parametrize("change", ["dt_bias", "gelu", "reorder"])
def test_every_quirk_shows(change, official_case, quick_jit, monkeypatch):
    """Each quirk of the official code changes the logits by more than the tolerance."""
    micro = official_case("plain_mamba_micro")
    model = micro.build(reorder_parameters=change == "reorder")
    if change == "gelu":
        exact = jax.nn.gelu
        monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: exact(x, approximate=True))
    if change == "dt_bias":
        for block in model.blocks:
            block.mixer.dt_proj = nnx.clone(block.mixer.dt_proj)
            once = block.mixer.dt_proj.bias[...] / 2  # it is added twice, so halve it
            block.mixer.dt_proj.bias = nnx.Param(once)
    logits = quick_jit(lambda model, image: model(image))(model, jnp.asarray(micro.image))
    assert relative_error(logits, micro["logits"]) > FORWARD


@pytest.mark.parametrize(
    ("name", "sizes", "grid"),
    [
        ("plain_mamba_l1", {}, (14, 14)),
        ("plain_mamba_l3", dict(img_size=(96, 160)), (6, 10)),
        ("plain_mamba_l1", dict(img_size=(70, 34)), (5, 3)),  # the stem pads incomplete patches
        ("plain_mamba_l1", dict(img_size=32, patch_size=4), (8, 8)),
        ("plain_mamba_l1", dict(img_size=(63, 33)), (4, 3)),
        ("plain_mamba_l1", dict(img_size=32, patch_size=8, stride=4), (8, 8)),
    ],
)
def test_sizes(name, sizes, grid):
    config = model_config(name, **sizes)
    assert config.grid == grid
    images = jax.ShapeDtypeStruct((2, *config.img_size, 3), jnp.float32)
    features = jax.eval_shape(
        lambda model, images: model.features(images), model_of_shapes(name, depth=1, **sizes), images
    )
    assert features.x.shape == (2, grid[0] * grid[1], config.embed_dim) and features.cls is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(img_size=0), "img_size=0"),
        (dict(stride=3), "stride=3"),
        (dict(patch_size=5), "patch_size=5"),
        (dict(d_conv=4), "d_conv=4"),
        (dict(depth=2, layers_with_dwconv=(2,)), r"layers_with_dwconv=\(2,\)"),
        (dict(num_heads=3), "plain_mamba_l1 .* 'num_heads'"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        create_model("plain_mamba_l1", **sizes)


def test_bfloat16(official_case, quick_jit):
    micro = official_case("plain_mamba_micro")
    logits = quick_jit(lambda model, image: model(image))(micro.build(dtype="bfloat16"), jnp.asarray(micro.image))
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, micro["logits"]) < 0.05  # computed in bfloat16, and correctly


def test_drop_path_rates():
    config = model_config("plain_mamba_l1", depth=5, drop_path=0.2)
    np.testing.assert_allclose([config.drop_path_rate(i) for i in range(5)], np.linspace(0, 0.2, 5), rtol=1e-6)


def test_initial_values(quick_jit):
    """mmcls initialises every linear layer, dt_proj too, with N(0, 0.02) and a zero bias; convolutions as PyTorch."""
    model = quick_jit(lambda: create_model("plain_mamba_l1", depth=1, rngs=nnx.Rngs(0)))()
    mixer = model.blocks[0].mixer
    for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj, model.head):
        assert np.std(np.asarray(linear.kernel[...])) == pytest.approx(0.02, rel=0.05)
        assert linear.bias is None or not np.asarray(linear.bias[...]).any()
    for array, bound in (
        (mixer.conv_kernel, 1 / 7),
        (mixer.conv_bias, 1 / 7),
        (model.blocks[0].tail.kernel, 1 / 3),
        (model.patch_embed.stem.conv.kernel, 147**-0.5),
        (model.patch_embed.proj.kernel, 4096**-0.5),
        (model.patch_embed.proj.bias, 4096**-0.5),
    ):
        largest = float(np.abs(np.asarray(array[...])).max())
        assert 0.95 * bound < largest <= bound
    np.testing.assert_allclose(mixer.A_log[...], np.log(np.tile(np.arange(1, 17), (384, 1))), rtol=1e-6)
