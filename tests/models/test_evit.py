"""EViT on whole models: on DeiT against the method written out in NumPy, on ViM and PlainMamba by its properties.

The official numbers at keep ratio 0.7 are in test_deit.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from scipy.special import erf, softmax
from small_models import model_of_shapes, random_model

import top_jax
from top_jax.convert import load_state_dict
from top_jax.errors import InputError
from top_jax.pruning import Cut, Evit

SIZES = dict(img_size=16, patch_size=4, embed_dim=12, depth=3, num_classes=5)  # 16 patches
FAMILIES = {
    "vim_tiny": dict(d_state=3),
    "plain_mamba_l1": dict(d_state=3, layers_with_dwconv=(1,)),
    "deit_tiny": dict(num_heads=3),
}


def make(name, **overrides):
    """Builds a small model with random weights."""
    return random_model(name, scale=0.4, **{**SIZES, **FAMILIES[name], **overrides})


@pytest.fixture(scope="module")
def forward(quick_jit):
    def run(model, images):
        features = model.features(images, stages=(1, 2))
        return model.classify(features), features

    return quick_jit(run)


# ---- DeiT, in NumPy -------------------------------------------------------------------------------------------------


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def evit_of_one_image(image, weights, heads, depth, ratios, fuse):
    """Returns float64 logits of one image `[3, H, W]`, and the number of patch tokens after each block."""
    kernel = weights["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    rows, columns = image.shape[1] // side, image.shape[2] // side
    patches = [
        image[:, r * side : (r + 1) * side, c * side : (c + 1) * side].ravel()
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.stack(patches) @ kernel.reshape(len(kernel), -1).T + weights["patch_embed.proj.bias"]
    x = np.concatenate([weights["cls_token"][0], x]) + weights["pos_embed"][0]
    counts = []
    for block in range(depth):
        qkv = linear(layer_norm(x, weights, f"blocks.{block}.norm1"), weights, f"blocks.{block}.attn.qkv")
        q, k, v = (part.reshape(len(x), heads, -1) for part in np.split(qkv, 3, axis=1))
        attention = softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]), axis=-1)
        mixed = np.einsum("hqk,khd->qhd", attention, v).reshape(x.shape)
        x = x + linear(mixed, weights, f"blocks.{block}.attn.proj")
        if block + 1 in ratios:
            seen = attention[:, 0, 1:].mean(0)
            best = int(np.ceil(np.round(ratios[block + 1] * len(seen), 6)))
            if best < len(seen):
                ranked = np.argsort(-seen)
                parts = [x[:1], x[1:][ranked[:best]]]
                if fuse:
                    parts.append(seen[ranked[best:]][None] @ x[1:][ranked[best:]])
                x = np.concatenate(parts)
        hidden = linear(layer_norm(x, weights, f"blocks.{block}.norm2"), weights, f"blocks.{block}.mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, weights, f"blocks.{block}.mlp.fc2")
        counts.append(len(x) - 1)
    return linear(layer_norm(x, weights, "norm")[0], weights, "head"), counts


@pytest.fixture(scope="module")
def shallow(official_case):
    """Returns the first three blocks of the official case: (model settings, state_dict, images `[B, 3, H, W]`)."""
    case = official_case("evit_micro")
    gone = tuple(f"blocks.{block}." for block in range(3, case.config["depth"]))
    weights = {key: array for key, array in case.weights.items() if not key.startswith(gone)}
    return {**case.config, "depth": 3}, weights, case["image_nchw"]


@pytest.mark.parametrize(
    "keep_ratio, fuse, counts",
    [
        (0.5, True, [33, 18, 18]),
        pytest.param(0.6, True, [40, 25, 25], marks=pytest.mark.slow),
        pytest.param(0.7, True, [46, 34, 34], marks=pytest.mark.slow),  # quick against the official code
        (0.8, False, [52, 42, 42]),
        pytest.param(0.9, True, [59, 55, 55], marks=pytest.mark.slow),
        ((0.98, 0.3), True, [64, 21, 21]),  # all but one stay, and that one is replaced
        ((0.99, 0.5), True, [64, 33, 33]),  # all stay: nothing is fused
    ],
)
def test_deit_against_numpy(keep_ratio, fuse, counts, shallow, forward):
    config, weights, images = shallow
    evit = Evit(after_blocks=(1, 2), keep_ratio=keep_ratio, fuse=fuse)
    model = model_of_shapes("deit_tiny", pruning=evit, **config)
    load_state_dict(model, weights)
    logits, features = forward(model, jnp.asarray(np.moveaxis(images, 1, -1)))
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    ratios = dict(zip(evit.after_blocks, evit.ratios, strict=True))
    for got, image in zip(np.asarray(logits), images, strict=True):
        want, tokens = evit_of_one_image(image.astype(np.float64), exact, config["num_heads"], 3, ratios, fuse)
        assert tokens == counts and relative_error(got, want) < 1e-5
    assert [*(stage.x.shape[1] for stage in features.stages), features.x.shape[1]] == counts


# ---- Every family ---------------------------------------------------------------------------------------------------


# PlainMamba takes as long as the others together; test_the_other_orders_run traces it.
@pytest.fixture(
    scope="module", params=["vim_tiny", "deit_tiny", pytest.param("plain_mamba_l1", marks=pytest.mark.slow)]
)
def family(request):
    return request.param


def score_of(family: str) -> str:
    return "attention" if family == "deit_tiny" else "clip"


def test_keeping_everything_is_the_dense_model(family, forward, images):
    evit = Evit(after_blocks=(1, 2), keep_ratio=1.0, score=score_of(family))
    logits, features = forward(make(family, pruning=evit), images)
    want, dense = forward(make(family), images)
    np.testing.assert_array_equal(logits, want)
    np.testing.assert_array_equal(features.positions, dense.positions)


@pytest.mark.parametrize("fuse, order, counts", [(True, "score", (9, 6)), (False, "position", (8, 4))])
def test_counts_places_and_class_token(fuse, order, counts, family, forward, images):
    """Keeps 8 of 16 plus the fused one, then 5 of 9 plus the fused one; only the fused one has no place."""
    evit = Evit(after_blocks=(1, 2), keep_ratio=0.5, score=score_of(family), fuse=fuse, order=order)
    model = make(family, pruning=evit)
    logits, features = forward(model, images)
    assert np.isfinite(logits).all() and [(cut.block, cut.after) for cut in model.schedule] == list(
        zip((1, 2), counts, strict=True)
    )
    for stage, count in zip(features.stages, counts, strict=True):
        assert stage.x.shape == (3, count, 12)
        places = np.asarray(stage.positions)
        assert (places[:, -1] == -1).all() if fuse else (places >= 0).all()
        for row, source in zip(places, np.asarray(stage.source), strict=True):
            real = row[row >= 0]
            assert len(set(real)) == len(real) and set(np.flatnonzero(source >= 0)) == set(real)
            if order == "position":
                assert (np.diff(real) > 0).all()
        assert order == "position" or (np.diff(places[:, :-1], axis=1) < 0).any()
    for one, stage in zip(features.stages[:1], features.stages[1:], strict=True):  # a dropped place never returns
        assert all(
            set(b) <= set(a) for a, b in zip(np.asarray(one.positions), np.asarray(stage.positions), strict=True)
        )
    if family == "plain_mamba_l1":
        assert features.cls is None
    else:
        assert features.cls.shape == (3, 12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fuse, order, count", [(True, "position", 6), (False, "score", 4)])
def test_the_other_orders_run(fuse, order, count, family, images):
    evit = Evit(after_blocks=(1, 2), keep_ratio=0.5, score=score_of(family), fuse=fuse, order=order)
    assert jax.eval_shape(make(family, pruning=evit).features, images).x.shape == (3, count, 12)


def test_images_do_not_influence_each_other(family, forward, images):
    model = make(family, pruning=Evit(after_blocks=(1, 2), keep_ratio=0.5, score=score_of(family)))
    logits, features = forward(model, images)
    other_images = np.array(images)
    other_images[1:] = -3 * other_images[1:] + 1
    other_logits, other = jax.tree.map(np.asarray, forward(model, jnp.asarray(other_images)))
    logits, features = jax.tree.map(np.asarray, (logits, features))
    np.testing.assert_array_equal(other_logits[0], logits[0])
    np.testing.assert_array_equal(other.positions[0], features.positions[0])
    assert (other.positions[1:] != features.positions[1:]).any()


def test_order_means_nothing_to_attention(forward, images):
    evit = Evit(after_blocks=(1, 2), keep_ratio=0.5)
    by_score, _ = forward(make("deit_tiny", pruning=evit), images)
    by_position, _ = forward(make("deit_tiny", pruning=dataclasses.replace(evit, order="position")), images)
    without, _ = forward(make("deit_tiny", pruning=dataclasses.replace(evit, fuse=False)), images)
    assert relative_error(by_position, by_score) < 1e-5 and relative_error(without, by_score) > 1e-3


def test_vim_goes_on_with_the_class_token_in_the_middle_and_both_streams_fused(quick_jit, images):
    evit = Evit(after_blocks=(1,), keep_ratio=0.5, score="clip", order="position")
    model = make("vim_tiny", dtype="bfloat16", pruning=evit)

    @quick_jit
    def first_block(model, images):
        before, evidence = model.blocks[0].mix(model.embed(images), None, None)
        return before, evit(before, evidence, Cut(block=1, before=16, kept=8, after=9))

    before, after = jax.tree.map(np.asarray, first_block(model, images))
    np.testing.assert_array_equal(after.cls_index, 4)
    np.testing.assert_array_equal(after.positions[:, 4], 8)
    assert after.x.dtype == jnp.bfloat16 and after.residual.dtype == jnp.float32
    for image in range(3):
        dropped = sorted(set(range(17)) - set(np.asarray(after.positions[image]).tolist()))
        assert len(dropped) == 8
        residual = np.asarray(before.residual[image], np.float64)[dropped].mean(0)
        hidden = np.asarray(before.x[image], np.float64)[dropped].mean(0)
        assert relative_error(after.residual[image, -1], residual) < 1e-6
        assert relative_error(after.x[image, -1], hidden) < 2**-7


@pytest.mark.parametrize("score", ["random", "uniform", "delta"])
def test_every_score_runs(score, images):
    model = make("vim_tiny", pruning=Evit(after_blocks=(1, 2), keep_ratio=0.5, score=score))
    assert jax.eval_shape(model.features, images).x.shape == (3, 6, 12)


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
def test_the_default_score_is_deits(name):
    with pytest.raises(InputError, match="score='attention'"):
        make(name, pruning=Evit(after_blocks=(1,), keep_ratio=0.5))


def test_public_name():
    assert top_jax.Evit is Evit and "Evit" in top_jax.__all__
