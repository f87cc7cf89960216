"""Published datasets: how they are recognised, and what is said of what is missing."""

import pytest

from top_jax.config import DataConfig
from top_jax.data.official import OFFICIAL, completeness, has_wnid_classes, official_dataset, official_images
from top_jax.data.sources import DigitsSource, ImageFolderSource

IMAGENET, CIFAR = OFFICIAL["imagenet2012"], OFFICIAL["cifar10"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet2012", IMAGENET),
        ("imagenet2012:5.1.0", IMAGENET),
        ("cifar10", CIFAR),
        ("imagenet2012_subset/10pct:5.0.0", None),
        ("food101", None),
    ],
)
def test_by_tfds_name(name, expected):
    assert official_dataset(DataConfig(source="tfds", name=name), DigitsSource("test")) is expected


def make_classes(root, count):
    for wnid in range(count):
        folder = root / "train" / f"n{wnid:08}"
        folder.mkdir(parents=True)
        (folder / "0.JPEG").touch()
    return ImageFolderSource(root, "train")


def test_a_folder_of_a_thousand_wnids_is_imagenet(tmp_path):
    config = DataConfig(source="image_folder", data_dir=str(tmp_path))
    source = make_classes(tmp_path, 1000)
    assert official_dataset(config, source) is IMAGENET and has_wnid_classes(source)
    (tmp_path / "train" / "n00000999").rename(tmp_path / "train" / "cat")
    source = ImageFolderSource(tmp_path, "train")
    assert official_dataset(config, source) is None and not has_wnid_classes(source)


def test_a_folder_of_fewer_wnids_is_not(tmp_path):
    source = make_classes(tmp_path, 3)
    assert official_dataset(DataConfig(source="image_folder"), source) is None and has_wnid_classes(source)
    assert official_dataset(DataConfig(), DigitsSource("test")) is None


def test_images_of_a_split():
    tfds = DataConfig(source="tfds", name="imagenet2012", eval_split="validation")
    assert official_images(IMAGENET, tfds, train=True) == 1_281_167
    assert official_images(IMAGENET, tfds, train=False) == 50_000
    part = DataConfig(source="tfds", name="cifar10", train_split="train[:10%]")
    assert official_images(CIFAR, part, train=True) is None  # a part by choice
    assert official_images(CIFAR, part, train=False) == 10_000


def test_the_splits_of_a_folder_are_known_by_their_use():
    folder = DataConfig(source="image_folder", train_split="ILSVRC_train", eval_split="val")
    assert [official_images(IMAGENET, folder, train=train) for train in (True, False)] == [1_281_167, 50_000]
    same = DataConfig(source="image_folder", train_split="all", eval_split="all")
    assert official_images(IMAGENET, same, train=False) == 1_281_167


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (1_281_167, "train has all 1,281,167 images of ImageNet-1K"),
        (160, "train has 160 of 1,281,167 images: a sample, not ImageNet-1K"),
        (1_281_000, "train has 1,281,000 of 1,281,167 images: 167 of ImageNet-1K are missing"),
        (1_281_170, "train has 1,281,170 images, 3 more than the 1,281,167 of ImageNet-1K"),
    ],
)
def test_completeness_in_words(images, words):
    assert completeness("train", images, IMAGENET, 1_281_167) == words
