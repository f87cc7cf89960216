"""Accuracy counts every image once for any batch size, and equals NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import random_model

from top_jax.config import DataConfig
from top_jax.data import eval_batches, open_source
from top_jax.data.sources import Record
from top_jax.errors import InputError
from top_jax.evaluation.accuracy import evaluate_model, make_eval_step
from top_jax.models.weights import weights_of
from top_jax.pruning import Pruning

DATA = DataConfig(source="digits", eval_crop=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), prefetch=1)


@pytest.fixture(scope="module")
def model():
    return random_model(
        "vim_tiny",
        scale=0.3,
        num_classes=10,
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        d_state=4,
        pruning=Pruning(after_blocks=(1,), keep_ratio=0.5),
    )


@pytest.fixture(scope="module")
def source():
    return open_source(DATA, train=False)


@pytest.fixture(scope="module")
def by_hand(model, source):
    """Computes accuracies and loss of the whole split from one call of the model, in NumPy."""
    images = np.stack([source[i].image for i in range(len(source))])
    labels = np.array([source[i].label for i in range(len(source))])
    logits = np.asarray(jax.jit(lambda m, x: m(x))(model, jnp.asarray((images / 255.0 - 0.5) / 0.5, jnp.float32)))
    order = np.argsort(-logits, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return {
        "accuracy": np.mean(order[:, 0] == labels),
        "accuracy_top5": np.mean((order[:, :5] == labels[:, None]).any(axis=1)),
        "loss": -np.mean(log_p[np.arange(len(labels)), labels]),
    }


@pytest.mark.parametrize("batch_size", [120, 97])
def test_every_image_once(model, source, by_hand, batch_size):
    seen = []
    result = evaluate_model(model, source, DATA, batch_size=batch_size, on_batch=seen.append)
    assert result["images"] == sum(seen) == 360 and result["unreadable"] == 0
    assert seen == [batch_size] * (360 // batch_size) + [360 % batch_size] * bool(360 % batch_size)
    for name, expected in by_hand.items():
        assert result[name] == pytest.approx(expected, rel=1e-5), name
    assert 0 < by_hand["accuracy"] < by_hand["accuracy_top5"] < 1  # not trivial
    assert result["images_per_second"] > 0


def test_padding_rows_do_not_matter(model, source):
    """The content of a row with mask 0 does not matter."""
    weights, step = weights_of(model), make_eval_step(nnx.graphdef(model), DATA)
    with eval_batches(source, DATA, img_size=8, batch_size=200) as batches:
        _, last = batches
    assert last["mask"].sum() == 160
    garbage = {
        **last,
        "image": np.where(last["mask"][:, None, None, None] > 0, last["image"], 255).astype(np.uint8),
        "label": np.where(last["mask"] > 0, last["label"], 7).astype(np.int32),
    }
    expected, got = step(weights, last), step(weights, garbage)
    assert float(expected["count"]) == 160
    assert {name: float(value) for name, value in got.items()} == {k: float(v) for k, v in expected.items()}
    unmasked = step(weights, {**last, "mask": np.ones(200, np.float32)})
    assert float(unmasked["loss"]) > float(expected["loss"])


class Broken:
    """Digits of which some images cannot be read."""

    num_classes = 10
    class_names = tuple("0123456789")
    name = "broken"

    def __init__(self, source, indices):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        return Record(b"no JPEG", record.label) if index in self.indices else record

    def describe(self, index):
        return f"record {index}"


def test_unreadable_images_are_left_out_and_told(model, source):
    result = evaluate_model(model, Broken(source, {3, 250}), DATA, batch_size=120)
    assert (result["images"], result["unreadable"]) == (358, 2)


def test_refuses(model, source):
    other = Broken(source, ())
    other.num_classes, other.name = 7, "other"
    with pytest.raises(InputError, match="7 classes .* 10"):
        evaluate_model(model, other, DATA, batch_size=8)
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate_model(model, source, DATA, batch_size=0)
