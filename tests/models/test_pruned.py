"""ViM with token pruning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy, relative_error

from top_jax.models.features import make_features
from top_jax.pruning import Cut, Pruning

ALIGNMENTS = ("none", "hold", "decay")


@pytest.fixture(
    scope="module", params=[*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "hold")), "decay"]
)
def pruning(request):
    return Pruning(after_blocks=(1, 2), keep_ratio=(0.6, 0.5), alignment=request.param)


@pytest.fixture(scope="module")
def forward(quick_jit):
    """One program per (architecture, schedule): (model, images) -> (logits, features)."""

    def run(model, images):
        features = model.features(images)
        return model.classify(features), features

    return quick_jit(run)


@pytest.fixture(scope="module")
def dense(make_model, forward, images):
    return forward(make_model(), images)


@pytest.mark.parametrize(
    "alignment", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "hold")), "decay"]
)
def test_keeping_everything_is_the_dense_model(alignment, make_model, forward, images, dense):
    model = make_model(pruning=Pruning(after_blocks=(1, 2), keep_ratio=1.0, alignment=alignment))
    logits, features = forward(model, images)
    assert relative_error(logits, dense[0]) < 1e-6
    assert relative_error(features.x, dense[1].x) < 1e-6
    np.testing.assert_array_equal(features.positions, dense[1].positions)


def test_dense_features(dense, images):
    logits, features = dense
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    assert features.x.shape == (3, 16, 16) and features.x.dtype == jnp.float32
    assert features.cls.shape == (3, 16) and features.cls.dtype == jnp.float32
    np.testing.assert_array_equal(features.positions, np.tile(np.arange(16), (3, 1)))
    assert features.positions.dtype == jnp.int32


def test_blocks_run_by_hand(pruning, make_model, forward, images, quick_jit, dense):
    model = make_model(pruning=pruning)
    logits, features = forward(model, images)
    assert relative_error(logits, dense[0]) > 1e-3  # something was pruned

    cuts = {1: Cut(1, 16, 10, 10), 2: Cut(2, 10, 5, 5)}  # ceil(0.6 * 16), ceil(0.5 * 10)

    def by_hand(model, images):
        tokens = model.embed(images)
        for number, block in enumerate(model.blocks, start=1):
            positions = tokens.positions if pruning.alignment == "decay" else None
            tokens, evidence = block.mix(tokens, positions, None)
            if number in cuts:
                tokens = pruning(tokens, evidence, cuts[number])
        normed = model.norm(tokens.residual + tokens.x)
        cls = normed[jnp.arange(3), tokens.cls_index]
        return tokens, cls, model.head(cls)

    tokens, cls, by_head = jax.tree.map(np.asarray, quick_jit(by_hand)(model, images))
    assert tokens.x.shape == (3, 6, 16)
    np.testing.assert_array_equal(tokens.positions[np.arange(3), tokens.cls_index], 8)  # the class token's own slot
    assert relative_error(features.cls, cls) < 1e-5
    assert relative_error(logits, by_head) < 1e-5
    places = [np.delete(row, slot) for row, slot in zip(np.asarray(tokens.positions), tokens.cls_index, strict=True)]
    np.testing.assert_array_equal(features.positions, [np.where(row > 8, row - 1, row) for row in places])


def test_pruned_features_are_raster_places(pruning, make_model, forward, images):
    _, features = forward(make_model(pruning=pruning), images)
    assert features.x.shape == (3, 5, 16) and features.cls.shape == (3, 16)
    assert (np.diff(features.positions, axis=1) > 0).all()
    assert features.positions.min() >= 0 and features.positions.max() < 16


def other_images(images):
    """Only the first image is the same; in NumPy, which compiles nothing."""
    other = np.array(images)
    other[1:] = -3 * other[1:] + 1
    return jnp.asarray(other)


def test_images_do_not_influence_each_other(pruning, make_model, forward, images):
    model = make_model(pruning=pruning)
    logits, features = forward(model, images)
    other_logits, other = forward(model, other_images(images))
    (logits, features), (other_logits, other) = jax.tree.map(np.asarray, ((logits, features), (other_logits, other)))
    np.testing.assert_array_equal(other.positions[0], features.positions[0])
    np.testing.assert_array_equal(other_logits[0], logits[0])
    np.testing.assert_array_equal(other.x[0], features.x[0])
    assert (other.positions[1:] != features.positions[1:]).any()


@pytest.mark.parametrize("score", ["noclip", "l1", "l2", "delta", "random", "uniform"])
def test_every_score_runs(score, make_model, images):
    model = make_model(depth=2, pruning=Pruning(after_blocks=(1,), keep_ratio=0.5, score=score))
    out = jax.eval_shape(lambda: model.features(images))
    assert out.x.shape == (3, 8, 16)


def test_score_order_is_the_baseline(make_model, forward, images):
    baseline = Pruning(after_blocks=(1,), keep_ratio=0.5, alignment="none", order="score")
    _, features = forward(make_model(pruning=baseline), images)
    assert (np.diff(features.positions, axis=1) < 0).any()
    assert all(len(set(row)) == 8 for row in np.asarray(features.positions).tolist())


def test_one_compilation_for_many_batches(make_model, images):
    traces = []

    def classify(model, images):
        traces.append(images.shape)
        return model(images)

    model = make_model(depth=2, pruning=Pruning(after_blocks=(1,), keep_ratio=0.5))
    jitted = jax.jit(classify, compiler_options={"xla_backend_optimization_level": 0})
    outputs = [jitted(model, np.asarray(images) * np.float32(scale)) for scale in (1.0, -2.0, 0.5, 30.0)]
    assert len(traces) == 1 and jitted._cache_size() == 1
    assert not np.array_equal(outputs[0], outputs[1])
    jitted.lower(model, np.asarray(images)[:2])
    assert len(traces) == 2  # so that the count above can fail


def test_schedule_that_does_not_fit(make_model):
    with pytest.raises(ValueError, match="block 3 of 3"):
        make_model(pruning=Pruning(after_blocks=(3,), keep_ratio=0.5))


def test_class_slot_is_not_a_raster_place(make_model, images):

    @in_numpy
    def embedded(model, images):
        tokens = model.embed(images)
        return tokens, make_features(tokens, (4, 4))

    tokens, features = embedded(make_model(), images)
    np.testing.assert_array_equal(features.positions[0], np.arange(16))
    np.testing.assert_array_equal(features.cls, tokens.x[:, 8])
    np.testing.assert_array_equal(features.x, np.delete(tokens.x, 8, axis=1))
