"""Each operation of the segmentation pipeline equals what mmsegmentation and OpenCV computed (`seg_protocol.npz`)."""

import json

import numpy as np
import pytest

from top_jax.config import IMAGENET_MEAN, IMAGENET_STD
from top_jax.data import segmentation_transforms as dense
from top_jax.data.segmentation_transforms import IGNORED, Window


@pytest.fixture(scope="module")
def protocol(fixtures):
    with np.load(fixtures / "seg_protocol.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def small(protocol):
    """The photograph that the photometric operations were given, uint8 [40, 55, 3]."""
    return protocol["image_rgb"][::4, ::4]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_resized(protocol, case):
    image, labels = protocol["image_rgb"], protocol["label"]
    expected = json.loads(str(protocol["config"]))["resize"][case]
    size = dense.scaled_size(labels.shape, expected["scale"])
    assert list(size) == expected["shape"]
    np.testing.assert_array_equal(dense.resize_labels(labels, size), protocol[f"resize{case}/label"])
    if case:  # of the first the fixture has the labels only
        np.testing.assert_array_equal(dense.resize_image(image, size), protocol[f"resize{case}/image_rgb"])


def test_test_sizes(protocol):
    for height, width, *expected in protocol["sizes_2048_512"].tolist():
        size = dense.scaled_size((height, width), (2048, 512))
        assert [*size, *dense.multiple_size(size, 32)] == expected


@pytest.mark.parametrize("size", [(20, 27), (40, 55), (97, 31), (80, 110), (1, 1)])
def test_a_window_is_that_part_of_the_whole(small, size):
    """Also for half the size, where OpenCV takes means, and for a side that stays."""
    labels = small[..., 0]
    whole, classes = dense.resize_image(small, size), dense.resize_labels(labels, size)
    window = Window(size[0] // 3, size[1] // 2, (size[0] + 1) // 2, (size[1] + 1) // 3)
    part = np.s_[window.top : window.top + window.height, window.left : window.left + window.width]
    assert whole.shape == (*size, 3)
    np.testing.assert_array_equal(dense.resize_image(small, size, window), whole[part])
    np.testing.assert_array_equal(dense.resize_labels(labels, size, window), classes[part])


def test_half_the_size_is_the_mean():
    """cv2.resize(x, (2, 1)), which takes INTER_AREA there."""
    image = np.repeat(np.uint8([[0, 1, 7, 8], [0, 1, 8, 8]])[..., None], 3, axis=2)
    assert dense.resize_image(image, (1, 2))[0, :, 0].tolist() == [1, 8]


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_photometric_operations(protocol, small, operation):
    cases = [name for name in protocol if name.startswith(f"{operation}/")]
    assert len(cases) == 3
    for name in cases:
        argument = float(name.partition("/")[2])
        changed = getattr(dense, operation)(small, int(argument) if operation == "hue" else argument)
        np.testing.assert_array_equal(changed, protocol[name], err_msg=name)


def test_grey_has_no_hue():
    grey = np.full((2, 33, 3), 77, np.uint8)
    for changed in (dense.hue(grey, 9), dense.saturation(grey, 1.5)):
        assert np.abs(changed.astype(int) - 77).max() <= 1  # OpenCV's own rounding


def test_photometric_draws(small):
    """Half of the draws of each operation do nothing, so 1 image in 16 stays; orders and arguments vary."""
    results = [dense.photometric(small, np.random.default_rng(i)) for i in range(200)]
    same = sum(np.array_equal(result, small) for result in results)
    assert 3 <= same <= 30
    assert len({result.tobytes() for result in results}) > 150  # of the hue alone there are 36


def test_normalised_and_padded(protocol, small):
    image = dense.normalize_image(small, IMAGENET_MEAN, IMAGENET_STD)
    image, _ = dense.pad(image, small[..., 0], (48, 64))
    np.testing.assert_array_equal(image, protocol["normalised_padded_hwc_rgb"])
    _, labels = dense.pad(protocol["image_rgb"], protocol["label"], (192, 256))
    np.testing.assert_array_equal(labels, protocol["padded_label"])


def test_reduce_zero_label(protocol):
    """All values stand for a class of 254."""
    values = np.arange(256, dtype=np.uint8)[None]
    classes = dense.to_classes(values, 254, ignore_label=255, reduce_zero_label=True)
    np.testing.assert_array_equal(classes[0], protocol["reduce_zero_label"])


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0, 1, 255], dict(ignore_label=255, reduce_zero_label=False), [0, 1, IGNORED]),
        ([0, 1, 2], dict(ignore_label=0, reduce_zero_label=False), [IGNORED, 1, 2]),
        ([0, 1, 7, 255], dict(ignore_label=7, reduce_zero_label=True), [IGNORED, 0, IGNORED, IGNORED]),
    ],
)
def test_what_values_mean(values, settings, expected):
    assert dense.to_classes(np.uint8([values]), 3, **settings).tolist() == [expected]


def test_a_value_without_a_class():
    with pytest.raises(dense.LabelError, match=r"value 4 in 2 pixels.*1 to 3 \(0, 255:"):
        dense.to_classes(np.uint8([[1, 4, 4, 9]]), 3, ignore_label=255, reduce_zero_label=True)


def test_crops_are_drawn_anew_for_more_classes():
    """One column in ten has another class: without a limit most crops miss it, with one only 1 in 3,000 does."""
    labels = np.zeros((10, 200), np.uint8)
    labels[:, 100:110] = 1
    rng = np.random.default_rng(0)

    def mixed(share):
        crops = [dense.random_crop(labels, labels.shape, (10, 100), rng, share) for _ in range(100)]
        for window, classes in crops:
            np.testing.assert_array_equal(classes, labels[:, window.left : window.left + 100])
        return sum(0 < (classes == 1).mean() for _, classes in crops)

    assert mixed(1.0) < 100 and mixed(0.999) == 100


def test_a_crop_of_a_smaller_image_is_the_image():
    window, labels = dense.random_crop(np.full((3, 9), IGNORED), (6, 5), (8, 4), np.random.default_rng(0), 0.75)
    assert window[0] == 0 and window[2:] == (6, 4) and (labels == IGNORED).all()
