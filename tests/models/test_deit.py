"""DeiT against what the official code computed (tests/fixtures/README.md), and what else it guarantees."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy, relative_error
from flax import nnx
from scipy.special import erf
from small_models import random_model

from top_jax.convert.key_maps import official_keys
from top_jax.errors import InputError
from top_jax.models import abstract_model, create_model, model_config
from top_jax.pruning import Evit, Merging, Pruning

# Relative to the largest value.
FORWARD, GRADIENT = 1e-5, 1e-4
PARAMETERS = {"deit_tiny": 5_717_416, "deit_small": 22_050_664, "deit_base": 86_567_656}
SMALL = dict(img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=5)


def make(**overrides):
    """Builds a small DeiT with random weights."""
    return random_model("deit_tiny", scale=0.4, **{**SMALL, **overrides})


@pytest.fixture(scope="module")
def forward(quick_jit):
    def run(model, images):
        features = model.features(images, stages=(1, 3))
        return model.classify(features), features

    return quick_jit(run)


@pytest.fixture(scope="module")
def dense(forward, images):
    return forward(make(), images)


@pytest.fixture(scope="module", params=[pytest.param("deit_micro", marks=pytest.mark.slow), "evit_micro"])
def official(request, official_case):
    return official_case(request.param)


@pytest.fixture(scope="module")
def computed(official, quick_jit):
    """Returns (logits, features with every stage, image gradient of sum(logits * grad_weight))."""
    reduction = None
    if "reduction" in official.arrays:
        settings = json.loads(str(official["reduction"]))
        reduction = Evit(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    model = official.build(pruning=reduction)

    def loss(compared, rest, model):
        image = jnp.concatenate([compared, rest])
        features = model.features(image, stages=tuple(range(1, model.config.depth + 1)))
        logits = model.classify(features)
        return jnp.sum(logits * official["grad_weight"][None]), (logits, features)

    graded = quick_jit(jax.value_and_grad(loss, has_aux=True))
    count = len(official.grad_image)  # for EViT only that of the first image
    (_, (logits, features)), gradient = graded(*map(jnp.asarray, np.split(official.image, [count])), model)
    return logits, features, gradient


def test_official_logits(official, computed):
    assert relative_error(computed[0], official["logits"]) < FORWARD


def test_official_class_token_and_token_count_after_every_block(official, computed):
    stages = computed[1].stages
    assert [stage.x.shape[1] + 1 for stage in stages] == official["tokens_after_block"].tolist()
    for stage, want in zip(stages, official["cls_after_block"], strict=True):
        assert relative_error(stage.cls, want) < FORWARD


def test_official_image_gradient(official, computed):
    assert relative_error(computed[2], official.grad_image) < GRADIENT


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = abstract_model(name)
    ours = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert sum(int(np.prod(shape)) for shape in ours.values()) == PARAMETERS[name]
    keys = official_keys(model.config)
    assert {key.ours for key in keys} == ours.keys() and len({key.torch for key in keys}) == len(keys) == len(ours)
    assert model.config.head_dim == 64


def test_initial_values(quick_jit):
    """Initial values follow facebookresearch/deit: N(0, 0.02), and PyTorch's default for the convolution."""
    model = quick_jit(lambda: create_model("deit_tiny", depth=2))()
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    bound = (3 * 16 * 16) ** -0.5
    for path, param in params.items():
        value = np.asarray(param[...])
        if path[0] == "patch_embed":
            assert 0.9 * bound < np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        elif path[-1] in ("kernel", "cls_token", "pos_embed"):
            assert value.std() == pytest.approx(0.02, rel=0.03 if value.size > 1000 else 0.2)
        else:
            np.testing.assert_array_equal(value, 1.0 if path[-1] == "scale" else 0.0)
    first, second = (params["blocks", index, "attn", "qkv", "kernel"][...] for index in range(2))
    assert (first != second).any()


def test_features_and_stages(dense, images):
    logits, features = dense
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    assert features.x.shape == (3, 16, 12) and features.cls.shape == (3, 12)
    assert [stage.x.shape for stage in features.stages] == [(3, 16, 12)] * 2
    np.testing.assert_array_equal(features.positions, np.tile(np.arange(16), (3, 1)))
    np.testing.assert_array_equal(features.source, features.positions)
    normed = in_numpy(lambda model, stages: [model.norm(stage.x) for stage in stages])(make(), features.stages)
    assert relative_error(normed[1], features.x) < 1e-5
    assert relative_error(normed[0], features.x) > 1e-2


def test_class_row_is_the_evidence(images):
    """Written out for the first block: softmax over all tokens, averaged over the heads."""
    model = make()

    @in_numpy
    def mixed(model, images):
        tokens = model.embed(images)
        return model.blocks[0].norm1(tokens.x), model.blocks[0].mix(tokens, None, None)[1]

    x, evidence = mixed(model, images)
    assert evidence.keys() == set(model.EVIDENCE) and evidence["attention"].dtype == jnp.float32
    x = x.astype(np.float64)
    qkv = x @ np.asarray(model.blocks[0].attn.qkv.kernel[...], np.float64) + np.asarray(model.blocks[0].attn.qkv.bias)
    rows = []
    for head in range(3):
        q, k = (qkv[:, :, part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in (0, 1))
        exp = np.exp(np.einsum("bd,bkd->bk", q[:, 0], k) / 2)
        rows.append(exp / exp.sum(1, keepdims=True))
    assert relative_error(evidence["attention"], np.mean(rows, axis=0)) < 1e-5


def test_a_merged_token_draws_the_attention_of_its_patches():
    """Proportional attention: one token of size 3 stands for three equal ones."""
    layer, attention = make().blocks[0].attn, in_numpy(lambda layer, x, size: layer(x, size))
    x = np.random.default_rng(2).normal(size=(2, 4, 12)).astype(np.float32)
    spread = x[:, np.array([0, 1, 1, 1, 2, 3])]
    want, want_row = attention(layer, spread, None)
    got, row = attention(layer, x, np.tile(np.asarray([[1, 3, 1, 1]], np.float32), (2, 1)))
    merged = np.array([0, 1, 4, 5])
    assert relative_error(got, want[:, merged]) < 1e-5
    assert relative_error(row[:, 1], np.sum(want_row[:, 1:4], axis=1)) < 1e-5
    without, _ = attention(layer, x, None)
    assert relative_error(without, got) > 1e-3
    ones, _ = attention(layer, x, np.ones((2, 4), np.float32))
    assert relative_error(ones, without) < 1e-6


def test_norms_and_gelu():
    """On these inputs eps = 1e-5 or the tanh approximation would show; on the official ones they would not."""
    model = make()
    x = np.random.default_rng(3).normal(size=(2, 4, 12)) * 1e-3
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    norms, mlp = (model.norm, model.blocks[0].norm1, model.blocks[0].norm2), model.blocks[0].mlp

    @in_numpy
    def applied(norms, mlp, x, wide):
        return [norm(x) for norm in norms], mlp.fc1(wide), mlp(wide)

    got, hidden, transformed = applied(norms, mlp, x.astype(np.float32), (x * 1e3).astype(np.float32))
    for norm, normed in zip(norms, got, strict=True):
        want = (x - x.mean(-1, keepdims=True)) / spread * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
        assert relative_error(normed, want) < 1e-5
    hidden = hidden.astype(np.float64)
    want = hidden * (1 + erf(hidden / np.sqrt(2))) / 2 @ np.asarray(mlp.fc2.kernel[...]) + np.asarray(mlp.fc2.bias[...])
    assert relative_error(transformed, want) < 1e-5


def test_merging_reaches_the_attention(forward, images):
    """The size of merged tokens is used, and the class token stays first, also with condensed tokens."""

    @in_numpy
    def attended(model, images, size):
        block, tokens = model.blocks[0], model.embed(images)
        _, evidence = block.mix(dataclasses.replace(tokens, size=size), None, None)
        return evidence["attention"], block.attn(block.norm1(tokens.x), size)[1]

    size = np.random.default_rng(4).integers(1, 5, (3, 17)).astype(np.float32)
    np.testing.assert_array_equal(*attended(make(), images, size))
    logits = {}
    for alignment in ("none", "hold"):
        logits[alignment], features = forward(
            make(pruning=Merging(after_blocks=(1,), keep_ratio=0.5, alignment=alignment)), images
        )
        assert features.x.shape == (3, 8, 12) and float(features.size.sum()) == 3 * 16
    assert relative_error(logits["none"], logits["hold"]) < 1e-5


def test_pruning_runs_where_neither_alignment_nor_order_means_anything(forward, images, dense):
    schedule = dict(after_blocks=(1, 2), keep_ratio=0.6, score="attention")
    logits, features = forward(make(pruning=Pruning(**schedule, alignment="hold")), images)
    assert features.x.shape == (3, 6, 12) and relative_error(logits, dense[0]) > 1e-3
    again, shuffled = forward(make(pruning=Pruning(**schedule, alignment="none", order="score")), images)
    assert not np.array_equal(features.positions, shuffled.positions)
    np.testing.assert_array_equal(np.sort(shuffled.positions, axis=1), features.positions)
    assert relative_error(again, logits) < 1e-5
    assert relative_error(shuffled.cls, features.cls) < 1e-5


@pytest.mark.parametrize("score", ["random", "uniform"])
def test_controls_run(score, images):
    model = make(depth=2, pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, score=score))
    assert jax.eval_shape(model.features, images).x.shape == (3, 8, 12)


def test_bfloat16(forward, images, dense):
    half = make(dtype="bfloat16")
    error = relative_error(forward(half, images)[0], dense[0])
    assert 1e-5 < error < 0.1  # computed in bfloat16, and correctly
    tokens = jax.eval_shape(half.embed, images)
    mixed, evidence = jax.eval_shape(lambda tokens: half.blocks[0].mix(tokens, None, None), tokens)
    after = jax.eval_shape(lambda tokens: half.blocks[0].transform(tokens, None), mixed)
    assert {array.dtype for array in (tokens.x, mixed.x, after.x, *evidence.values())} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(lambda tokens: half.blocks[0].mix(tokens, None, None))(tokens))
    assert "bf16[3,17,36]" in program and "f32[3,17,36]" not in program  # q, k and v


def test_remat_changes_no_number(forward, images, dense):
    model = make(remat=True)
    assert "remat" in str(jax.make_jaxpr(lambda model, images: model(images))(model, images))
    np.testing.assert_allclose(forward(model, images)[0], dense[0], rtol=1e-5)


def test_drop_path():
    config = model_config("deit_tiny", depth=5, drop_path=0.2)
    np.testing.assert_allclose([config.drop_path_rate(index) for index in range(5)], [0, 0.05, 0.1, 0.15, 0.2])
    model = abstract_model("deit_tiny", depth=5, drop_path=0.2)
    paths = [path for block in model.blocks for path in (block.drop_path1, block.drop_path2)]
    np.testing.assert_allclose([path.rate for path in paths], np.repeat([0, 0.05, 0.1, 0.15, 0.2], 2))
    assert len({path.index for path in paths}) == 10  # each one draws separately


def test_train_mode(quick_jit, images, forward):
    model = make(drop_path=0.6)
    model.train()
    with pytest.raises(InputError, match="keys="):
        model(images)

    @quick_jit
    def left_out(model, images, keys):
        """Returns the images whose attention the last block drops, and those whose MLP it drops."""
        tokens, block = model.embed(images), model.blocks[2]
        after = (block.mix(tokens, None, keys)[0], block.transform(tokens, keys))
        return [jnp.all(half.x == tokens.x, axis=(1, 2)) for half in after]

    keys = jax.random.split(jax.random.key(1), 200)
    left_out = np.asarray(left_out(model, np.tile(np.asarray(images)[:1], (200, 1, 1, 1)), keys))
    assert all(0.45 < share.mean() < 0.75 for share in left_out) and (left_out[0] != left_out[1]).any()


def test_sizes(images):
    model = make(img_size=(8, 20))
    assert model.config.grid == (2, 5) and model.pos_embed.shape == (1, 11, 12)
    features = jax.eval_shape(model.features, jnp.zeros((2, 8, 20, 3)))
    assert features.x.shape == (2, 10, 12) and features.grid == (2, 5)
    assert make(mlp_ratio=2.0).blocks[0].mlp.fc1.kernel.shape == (12, 24)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_heads=5), "embed_dim=12 with num_heads=5"),
        (dict(num_heads=0), "embed_dim=12 with num_heads=0"),
        (dict(img_size=(16, 18)), r"img_size=\(16, 18\) with patch_size=4"),
        (dict(img_size=0), "img_size=0"),
        (dict(stride=2), "deit_tiny .* 'stride'"),
        (dict(pruning=Pruning(after_blocks=(1,), keep_ratio=0.5)), "score='clip'"),
        (dict(pruning=Evit(after_blocks=(3,), keep_ratio=0.5)), "block 3 of 3"),
    ],
)
def test_wrong_use(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)
