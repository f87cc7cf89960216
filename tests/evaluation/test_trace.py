"""A trace agrees with the model's own features, for each reduction method."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from comparison import in_numpy
from small_models import random_model

from top_jax.evaluation.trace import CLASS, FUSED, trace
from top_jax.pruning import Evit, Merging, Pruning

TWICE = dict(after_blocks=(1, 2), keep_ratio=0.6)
SIZES = dict(num_classes=5, depth=3, embed_dim=16)
MAMBA = dict(SIZES, d_state=2)
CASES = {
    "vim": ("vim_tiny", dict(MAMBA, img_size=(16, 24), patch_size=4), Pruning(**TWICE)),
    "plain_mamba": (
        "plain_mamba_l1",
        dict(MAMBA, img_size=16, patch_size=4, num_convs_patch_embed=0),
        Pruning(**TWICE, alignment="decay"),
    ),
    "evit": ("deit_tiny", dict(SIZES, img_size=16, patch_size=4, num_heads=2), Evit(**TWICE)),
    "merging": ("deit_tiny", dict(SIZES, img_size=16, patch_size=4, num_heads=2), Merging(**TWICE)),
}


@pytest.fixture(scope="module", params=["vim", "evit", "merging", pytest.param("plain_mamba", marks=pytest.mark.slow)])
def traced(request):
    """Returns (case, model, trace, features, logits of them) for two images."""
    name, sizes, pruning = CASES[request.param]
    model = random_model(name, scale=0.3, pruning=pruning, **sizes)
    images = jax.device_put(np.random.default_rng(0).normal(size=(2, *model.config.img_size, 3)).astype(np.float32))

    @in_numpy
    def run(model, images):
        features = model.features(images)
        return trace(model, images, attention_of=(1, 3)), features, model.classify(features)

    return request.param, model, *run(model, images)


def test_the_last_survivors_are_the_features(traced):
    _, model, found, features, logits = traced
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    assert list(found.stages) == [1, 2] and list(found.blocks) == [1, 2, 3]
    last = found.stages[2]
    for image in range(2):
        places = last.survivors[image]
        expected = np.where(features.positions[image] < 0, FUSED, features.positions[image])
        np.testing.assert_array_equal(places[places != CLASS], expected)
        assert np.sum(places == CLASS) == (features.cls is not None)
    np.testing.assert_array_equal(last.source, features.source)
    for block, stage in found.stages.items():
        assert np.sum(stage.survivors[0] != CLASS) == {cut.block: cut.after for cut in model.schedule}[block]
        np.testing.assert_array_equal(found.blocks[block + 1].places, stage.survivors)
    np.testing.assert_array_equal(found.stages[1].candidates, np.tile(np.arange(model.config.num_patches), (2, 1)))


def test_the_best_scores_stay(traced):
    case, _, found, *_ = traced
    for stage in found.stages.values():
        if case == "merging":
            assert stage.scores is None
            assert (stage.source >= 0).all()
            continue
        for image in range(2):
            stays = np.isin(stage.candidates[image], stage.survivors[image])
            places = stage.candidates[image] >= 0
            scores = stage.scores[image]
            assert scores[places & stays].min() >= scores[places & ~stays].max()


def test_orders_and_attention(traced):
    case, _, found, *_ = traced
    assert found.blocks[2].attention is None
    for number in (1, 3):
        view = found.blocks[number]
        length = view.places.shape[1]
        assert view.attention.shape == (2, length, length) and (view.attention >= 0).all()
        if case in ("evit", "merging"):  # DeiT's attention is the real one
            assert view.orders is None
            np.testing.assert_allclose(view.attention.sum(axis=-1), 1, atol=1e-5)
            continue
        paths = view.places[0][view.orders[:, 0]]
        assert len(paths) == (4 if case == "plain_mamba" else 2)
        np.testing.assert_array_equal(paths[1], paths[0][::-1])
    if case == "evit":
        assert np.sum(found.stages[1].survivors == FUSED) == 2
    elif case == "plain_mamba":
        row = found.blocks[1].places[0][found.blocks[1].orders[0, 0]]
        np.testing.assert_array_equal(row[:8], [0, 1, 2, 3, 7, 6, 5, 4])
    elif case == "vim":
        whole = found.blocks[1].places[0][found.blocks[1].orders[0, 0]]
        middle = (len(whole) - 1) // 2
        np.testing.assert_array_equal(whole, [*range(middle), CLASS, *range(middle, len(whole) - 1)])
        places = found.blocks[3].places[0]
        assert (np.diff(places[places >= 0]) > 0).all()  # hold: in raster order
