"""Segmenters with reduced tokens: what the fills put in a map, images of any size, wrong calls."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import filled

from top_jax.errors import InputError
from top_jax.models import Segmenter, abstract_segmenter, create_segmenter, segmenter_config, to_grid
from top_jax.models.features import FILLS
from top_jax.models.resizing import adaptive_average_pool, resize
from top_jax.pruning import Evit, Merging, Pruning

SIZES = {
    "vim_tiny": dict(img_size=64, embed_dim=8, depth=4, d_state=2, num_classes=3, aux_channels=4),
    "plain_mamba_l1": dict(img_size=64, embed_dim=8, depth=4, d_state=2, num_classes=3, aux_channels=4, channels=8),
}
TWICE = dict(after_blocks=(1, 3), keep_ratio=0.5)
REDUCTIONS = {
    "dense": None,
    "whole": Pruning(after_blocks=(1, 3), keep_ratio=1.0),
    "hold": Pruning(**TWICE),
    "none": Pruning(**TWICE, alignment="none", order="score"),
    "evit": Evit(**TWICE, score="clip"),
    "merge": Merging(**TWICE),
}


@functools.cache
def model_of(name: str, reduction: str = "dense", fill: str = "frozen", **changes) -> Segmenter:
    """Equal sizes give equal weights."""
    model = abstract_segmenter(name, pruning=REDUCTIONS[reduction], fill=fill, **{**SIZES[name], **changes})
    return filled(model, scale=0.3)


@pytest.fixture(scope="module")
def photos() -> jax.Array:
    return jax.device_put(np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def stages_of(photos, quick_jit):
    """The stages after blocks 1 to 4, computed once for each model."""
    run = quick_jit(lambda model, images: model.backbone.features(images, stages=(1, 2, 3, 4)).stages)
    return functools.cache(lambda name, reduction, **changes: run(model_of(name, reduction, **changes), photos))


@pytest.fixture(scope="module")
def shown(quick_jit):
    """What maps of 4 x 4 places show: `[B, 16, D]`."""

    def rows(stages, fill="frozen"):
        return [to_grid(stage, fill).reshape(len(stage.x), 16, -1) for stage in stages]

    return quick_jit(rows, static_argnames="fill")


VARIANTS = [
    *(pytest.param("vim_tiny", v, marks=pytest.mark.slow) for v in ("residual", "official_tiny", "official_small")),
    ("plain_mamba_l1", None),
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_frozen_shows_what_left_each_block(name, variant, stages_of, shown):
    """The dense value at the first prune, and the value before the second; survivors are as they are."""
    changes = {} if variant is None else {"variant": variant}
    dense, pruned = stages_of(name, "dense", **changes), stages_of(name, "hold", **changes)
    maps = [np.asarray(rows) for rows in shown(pruned)]
    first, second = np.asarray(pruned[0].source), np.asarray(pruned[2].source)
    assert (first < 0).sum() == 16 and (second < 0).sum() == 24
    np.testing.assert_allclose(maps[0], shown(dense[:1])[0], rtol=1e-5, atol=1e-5)
    for later in maps[1:]:
        np.testing.assert_array_equal(later[first < 0], maps[0][first < 0])
    gone = (first >= 0) & (second < 0)  # by the second prune, whose map still shows them as block 3 left them
    assert gone.any()
    np.testing.assert_array_equal(maps[3][gone], maps[2][gone])
    assert not np.array_equal(maps[2][gone], maps[1][gone])
    for stage, rows in zip(pruned, maps, strict=True):
        kept = np.asarray(stage.source) >= 0
        alive = np.take_along_axis(np.asarray(stage.x), np.maximum(np.asarray(stage.source), 0)[:, :, None], axis=1)
        np.testing.assert_array_equal(rows[kept], alive[kept])


@pytest.mark.parametrize("reduction", ["evit", "merge", pytest.param("none", marks=pytest.mark.slow)])
def test_frozen_with_every_method(reduction, stages_of, shown):
    """A merged patch shows its token, and so nothing is frozen; EViT's dropped patches are, its fused token is not."""
    last = stages_of("plain_mamba_l1", reduction)[3]
    rows = np.asarray(shown((last,))[0])
    source = np.asarray(last.source)
    assert (source < 0).any() == (reduction != "merge")
    alive = np.take_along_axis(np.asarray(last.x), np.maximum(source, 0)[:, :, None], axis=1)
    np.testing.assert_array_equal(rows[source >= 0], alive[source >= 0])
    np.testing.assert_array_equal(rows[source < 0], np.asarray(last.canvas)[source < 0])


@pytest.mark.parametrize("name", [pytest.param("vim_tiny", marks=pytest.mark.slow), "plain_mamba_l1"])
@pytest.mark.parametrize("fill", FILLS)
def test_keeping_everything_is_the_dense_model(name, fill, stages_of, shown):
    dense, whole = (shown(stages_of(name, reduction), fill=fill) for reduction in ("dense", "whole"))
    for one, other in zip(dense, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # two programs


def test_zero_is_zero_after_the_norm_and_frozen_before_it(stages_of, quick_jit):
    model = model_of("plain_mamba_l1", "hold")
    features = dataclasses.replace(stages_of("plain_mamba_l1", "hold")[3], stages=stages_of("plain_mamba_l1", "hold"))
    missing = np.asarray(features.source).reshape(2, 4, 4) < 0
    model = nnx.merge(*nnx.split(model))
    maps = {}
    for fill in FILLS:
        model.fill = fill
        maps[fill] = np.asarray(quick_jit(lambda model, features: model.token_maps(features)[3])(model, features))
        assert (maps[fill][missing] == 0).all() == (fill == "zero")
        np.testing.assert_array_equal(maps[fill][~missing], maps["frozen"][~missing])
    want = np.asarray(quick_jit(lambda model, x: model.backbone.norm(x))(model, features.canvas)).reshape(2, 4, 4, -1)
    np.testing.assert_allclose(maps["frozen"][missing], want[missing], atol=1e-6)


@pytest.mark.slow
def test_images_do_not_influence_each_other_and_gradients_pass_the_canvas(photos, quick_jit):
    model = model_of("vim_tiny", "hold")

    def frozen_part(model, images):
        last = model.backbone.features(images, stages=(4,)).stages[0]
        missing = (last.source < 0).reshape(*last.source.shape[:1], 4, 4, 1)
        return jnp.sum(jnp.where(missing, to_grid(last), 0.0)), model(images)

    (_, logits), gradient = quick_jit(jax.value_and_grad(frozen_part, argnums=1, has_aux=True))(model, photos)
    assert np.abs(gradient).sum(axis=(1, 2, 3)).min() > 0
    again = quick_jit(lambda model, images: model(images))(model, photos.at[1].multiply(-2.0))
    np.testing.assert_allclose(again[0], logits[0], atol=1e-5)
    assert np.abs(again[1] - logits[1]).max() > 1e-3


def test_plain_mamba_takes_any_size(quick_jit, without_type_checks):
    """And its schedule, traversals and position embedding follow the image."""
    model = model_of("plain_mamba_l1", "hold")
    images = jnp.asarray(np.ones((1, 50, 90, 3), np.float32))
    features = jax.eval_shape(lambda model, x: model.backbone.features(x), model, images)
    assert features.grid == (4, 6) and features.x.shape == (1, 6, 8)
    assert model.backbone.pos_embed.shape == (1, 16, 8)
    with pytest.raises(InputError, match="channels last"):
        model(images[..., :2])


def test_a_training_call(photos, quick_jit):
    """It needs keys, each image its own; it moves the statistics of both heads."""
    model = nnx.merge(*nnx.split(model_of("vim_tiny", "hold")))
    before = dict(nnx.to_flat_state(nnx.state(model, nnx.BatchStat)))
    model.train()
    with pytest.raises(InputError, match="keys"):
        model.logits(photos)

    def run(model, images, keys):
        decode, auxiliary = model.logits(images, keys)
        return decode, auxiliary, nnx.state(model, nnx.BatchStat)

    keys = jax.random.split(jax.random.key(0), 2)
    decode, auxiliary, statistics = quick_jit(run)(model, photos, keys)
    assert decode.shape == (2, 16, 16, 3) and auxiliary.shape == (2, 4, 4, 3)
    batches = {path: one[...] for path, one in nnx.to_flat_state(statistics) if path[-1] == "num_batches"}
    moved = [path for path, count in batches.items() if count == before[path][...] + 1]
    assert len(moved) == 1 + 12 + 1  # neck, decode head, auxiliary head


def test_resizing_of_more_and_fewer_places():
    x = jnp.asarray(np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1))
    assert resize(x, (3, 4)) is x
    run = jax.jit(lambda x: (resize(x, (6, 4)), adaptive_average_pool(x, 1), adaptive_average_pool(x, 2)))
    taller, mean, quarters = map(np.asarray, run(x))
    np.testing.assert_allclose(taller[0, :, 0, 0], [0, 1, 3, 5, 7, 8])
    np.testing.assert_allclose(mean[0, 0, 0], [5.5])
    np.testing.assert_allclose(quarters[0, :, :, 0], [[2.5, 4.5], [6.5, 8.5]])


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("deit_tiny", {}, "deit_tiny"),
        ("vim_tiny", {"variant": "small"}, "variant='small'"),
        ("plain_mamba_l1", {"variant": "residual"}, "variant='residual'"),
        ("vim_tiny", {"stages": (1, 2, 3)}, r"stages=\(1, 2, 3\)"),
        ("vim_tiny", {"stages": (4, 3, 2, 1)}, "stages="),
        ("vim_tiny", {"stages": (6, 12, 18, 25)}, "stages="),
        ("vim_tiny", {"depth": 3}, "depth=3"),
        ("vim_tiny", {"img_size": 16}, "img_size="),
        ("vim_tiny", {"num_classes": 0}, "num_classes=0"),
        ("vim_tiny", {"embed_dim": 18, "variant": "official_small"}, "embed_dim=18"),
        ("vim_tiny", {"pretrained": True}, "only for top_jax.create_model"),
        ("vim_tiny", {"width": 3}, "no setting 'width'; it has num_classes, fill, .*stages, .*embed_dim"),
    ],
)
def test_sizes_that_cannot_be(name, settings, named, without_type_checks):
    with pytest.raises(InputError, match=named):
        segmenter_config(name, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fill": "mean"}, "fill='mean'"),
        ({"inference": "crop"}, "inference="),
        ({"slide_stride": 65}, "slide_stride=65"),
    ],
)
def test_choices_that_cannot_be(settings, named, without_type_checks):
    with pytest.raises(InputError, match=named):
        create_segmenter("vim_tiny", **SIZES["vim_tiny"], **settings)
