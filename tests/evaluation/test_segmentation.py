"""Areas and mIoU by hand, and labels of windows against logits of the whole image."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import in_numpy
from PIL import Image

from top_jax.config import DataConfig
from top_jax.data import prepare_image
from top_jax.errors import InputError
from top_jax.evaluation.segmentation import areas, iou, make_predict, numbers, per_class
from top_jax.inference import segment
from top_jax.models import abstract_model, abstract_segmenter, create_segmenter
from top_jax.models.resizing import resize
from top_jax.models.sliding import cut_windows, labels_of_windows, window_starts
from top_jax.models.weights import weights_of

IGNORED, CLASSES = 255, 5


def test_areas_by_hand():
    """Class 3 occurs nowhere, 4 only in the prediction, and a masked image and an ignored pixel count nothing."""
    label = np.array([[[0, 0, 1, 2]], [[0, 1, IGNORED, 2]], [[1, 1, 1, 1]]], np.uint8)
    prediction = np.array([[[0, 1, 1, 2]], [[0, 4, 4, 2]], [[0, 0, 0, 0]]], np.int32)
    mask, index = np.array([1, 1, 0], np.float32), np.array([5, 6, -1], np.int32)
    found = in_numpy(functools.partial(areas, num_classes=CLASSES))(prediction, label, mask, index)
    assert found["intersection"].tolist() == [2, 1, 2, 0, 0]
    assert found["predicted"].tolist() == [2, 2, 2, 0, 1] and found["labelled"].tolist() == [3, 2, 2, 0, 0]
    assert (found["count"], found["unreadable"]) == (2, 0)
    ious = [2 / 3, 1 / 3, 1.0, 0.0]
    assert iou(found)[[0, 1, 2, 4]] == pytest.approx(ious) and np.isnan(iou(found)[3])
    shares = numbers(found)
    assert shares["miou"] == pytest.approx(np.mean(ious))
    assert shares["mean_accuracy"] == pytest.approx(np.mean([2 / 3, 1 / 2, 1]))
    assert shares["pixel_accuracy"] == pytest.approx(5 / 7)
    rows = per_class(found, "abcde")
    assert rows[3] == {"name": "d", "iou": None, "accuracy": None, "share": 0.0} and rows[4]["accuracy"] is None


def test_nothing_labelled():
    sums = {name: np.zeros(3) for name in ("intersection", "predicted", "labelled")}
    assert numbers(sums) == {"miou": 0.0, "mean_accuracy": 0.0, "pixel_accuracy": 0.0}


@pytest.mark.parametrize(
    "size, crop, stride, starts",
    [
        ((8, 8), (8, 8), 5, [(0, 0)]),
        ((8, 14), (8, 8), 5, [(0, 0), (0, 5), (0, 6)]),
        ((6, 9), (8, 8), 8, [(0, 0), (0, 1)]),
    ],
)
def test_window_starts(size, crop, stride, starts):
    """The last window is moved back into the image, as in mmseg."""
    assert list(window_starts(size, crop, stride)) == starts


@pytest.mark.parametrize("image_size, size", [((12, 17), (25, 31)), ((12, 8), (12, 8)), ((6, 20), (40, 70))])
def test_labels_of_windows(image_size, size):
    """Summed over windows on a canvas, divided by their count, resized, argmax: as mmseg does it."""
    crop, stride, rng = (8, 8), 5, np.random.default_rng(0)
    starts = window_starts(image_size, crop, stride)
    logits = [rng.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in starts]
    resized = in_numpy(lambda arrays: [resize(array, crop) for array in arrays])(logits)
    canvas = np.zeros((2, max(8, image_size[0]), max(8, image_size[1]), 3))
    count = np.zeros((*canvas.shape[1:3], 1))
    for one, (top, left) in zip(resized, starts, strict=True):
        canvas[:, top : top + 8, left : left + 8] += one
        count[top : top + 8, left : left + 8] += 1
    mean = (canvas / np.maximum(count, 1))[:, : image_size[0], : image_size[1]]
    want = np.argmax(in_numpy(lambda mean: resize(mean, size))(mean.astype(np.float32)), axis=-1)
    found = in_numpy(lambda logits: labels_of_windows(logits, image_size, crop, stride, size))(logits)
    assert found.shape == want.shape and np.mean(found != want) < 1e-3
    images = jax.ShapeDtypeStruct((2, *image_size, 3), jnp.float32)
    windows = jax.eval_shape(lambda images: cut_windows(images, crop, stride), images)
    assert [window.shape for window in windows] == [(2, 8, 8, 3)] * len(starts)


@pytest.mark.parametrize("width, starts", [(32, [0]), (64, [0, 21, 32])])
def test_predict(width, starts):
    """Windows of the model's size, by whatever model there is; slide inference of a real one: `test_segment`."""
    model = abstract_segmenter("vim_tiny", num_classes=3, img_size=32, embed_dim=16, depth=4)

    def logits_of(images):
        return images[:, ::4, ::4] ** 2

    images = np.random.default_rng(0).normal(size=(2, 32, width, 3)).astype(np.float32)
    predict = make_predict(model, merge=lambda scale: SimpleNamespace(logits=lambda x: (scale * logits_of(x), None)))
    found = predict(jnp.float32(2), jnp.asarray(images), (40, 70))
    windows = [logits_of(images[:, :, left : left + 32]) for left in starts]
    settings = (32, width), (32, 32), model.slide_stride, (40, 70)
    want = in_numpy(lambda windows: labels_of_windows(windows, *settings))(windows)
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
def test_segment(tmp_path):
    """A path, a file's bytes and pixels give the same labels, at the photograph's own size."""
    model = create_segmenter("vim_tiny", num_classes=3, img_size=32, patch_size=8, embed_dim=16, depth=4, channels=8)
    pixels = np.random.default_rng(0).integers(256, size=(48, 80, 3), dtype=np.uint8)
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file)
    data = DataConfig(scale=(128, 32))  # what the official protocol is for images of 32 pixels
    prepared = jnp.asarray(prepare_image(pixels, data))[None]
    bias = model.decode_head.classifier.conv_seg.bias
    bias[...] -= jnp.mean(model.logits(prepared[:, :, :32])[0], axis=(0, 1, 2))  # so that more than one class wins
    want = make_predict(model)(weights_of(model), prepared, (48, 80))[0]
    assert prepared.shape[1] == 32 and len(np.unique(want)) > 1
    window = prepared[:, :, :32]
    labels = make_predict(model)(weights_of(model), window, (32, 32))
    assert np.mean(labels == np.argmax(model(window), axis=-1)) > 0.999
    for photo in (pixels, file, str(file), file.read_bytes()):
        found = segment(model, photo)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, want)


def test_segment_refuses(without_type_checks):
    for model, photo, message in (
        (abstract_model("vim_tiny", depth=1), "photo.jpg", "a segmenter, as"),
        (abstract_segmenter("vim_tiny", depth=4, img_size=32), "photo.jpg", "fill it first"),
    ):
        with pytest.raises(InputError, match=message):
            segment(model, photo)
