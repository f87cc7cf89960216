"""Contents of a split: counts without decoding, a decoded sample, and comparison with published datasets."""

import io

import numpy as np
import pytest
from PIL import Image
from tfds_directory import write_tfds

from top_jax.config import DataConfig
from top_jax.data import inspection
from top_jax.data.inspection import (
    PUBLISHED,
    completeness,
    has_wnid_classes,
    inspect_split,
    published_dataset,
    published_images,
    records_to_read,
    spread,
)
from top_jax.data.sources import DigitsSource, ImageFolderSource, TfdsSource

IMAGENET, CIFAR = PUBLISHED["imagenet2012"], PUBLISHED["cifar10"]


def jpeg(width, height=None):
    file = io.BytesIO()
    Image.new("RGB", (width, height or width), "olive").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Six images of three classes; of class b's three the second is cut short."""
    for name, images in {"a": 1, "b": 3, "c": 2}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(images):
            (tmp_path / "train" / name / f"{i}.jpg").write_bytes(jpeg(20 + i, 40))
    broken = tmp_path / "train" / "b" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    return ImageFolderSource(tmp_path, "train")


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    """Twelve images of three classes, of which the last has none; records 4 and 7 hold no JPEG."""
    images = [(b"no image" if i in (4, 7) else jpeg(8 + i), int(i > 8)) for i in range(12)]
    root = write_tfds(tmp_path_factory.mktemp("tfds"), "toy", 3, {"train": images})
    return TfdsSource("toy", root, "train")


def test_a_folder_is_counted_and_its_broken_file_named(folder, tmp_path):
    seen = []
    report = inspect_split(folder, on_image=seen.append)
    assert (report.source, report.images, report.classes) == (f"{tmp_path}/train", 6, 3)
    assert (report.labels_read, report.smallest_class, report.largest_class) == (6, 1, 3)
    assert report.classes_without_images == 0
    assert (report.decoded, report.decoded_unreadable) == (6, 1)
    [line] = report.unreadable
    assert line.startswith(f"{tmp_path}/train/b/1.jpg (") and "runcated" in line
    assert report.shorter_side == (20, 20, 22)  # of a 20, b 20 and 22, c 20 and 21
    assert sum(seen) == records_to_read(folder, 64) == 6


def test_labels_of_a_folder_are_counted_without_its_files(folder, monkeypatch):
    """A million files are not opened for their labels."""
    opened = []
    read = ImageFolderSource.__getitem__
    monkeypatch.setattr(ImageFolderSource, "__getitem__", lambda self, i: opened.append(i) or read(self, i))
    assert inspect_split(folder, sample=2).labels_read == 6
    assert opened == [0, 5]


def test_a_sample_is_spread_over_the_split():
    assert spread(100, 5) == [0, 25, 50, 74, 99]
    assert spread(3, 64) == [0, 1, 2]
    assert spread(1000, 64)[-1] == 999 and len(set(spread(1000, 64))) == 64


def test_tfds_labels_are_read_and_classes_without_images_seen(tfds):
    report = inspect_split(tfds, sample=12)
    assert (report.images, report.labels_read) == (12, 12)
    assert (report.smallest_class, report.largest_class, report.classes_without_images) == (0, 9, 1)
    assert report.shorter_side == (8, 13, 19) and report.decoded_unreadable == 2
    assert [line.partition(" (")[0] for line in report.unreadable] == [
        "toy/1.0.0/train record 4",
        "toy/1.0.0/train record 7",
    ]


def test_of_a_large_tfds_split_some_labels_are_read(tfds, monkeypatch):
    """And the report says how many."""
    monkeypatch.setattr(inspection, "MOST_LABELS", 4)
    report = inspect_split(tfds, sample=2)
    assert (report.images, report.labels_read, report.largest_class) == (12, 4, 3)  # records 0, 4, 7 and 11
    assert records_to_read(tfds, 2) == 6


class Damaged:
    """A source whose records cannot all be read, which array_record says by OSError."""

    name, num_classes, class_names = "damaged/train", 2, ("a", "b")

    def __len__(self):
        return 5

    def __getitem__(self, index):
        from top_jax.data.sources import Record

        if index == 3:
            raise OSError("checksum")
        return Record(np.zeros((6, 4, 3), np.uint8), index % 2)

    def describe(self, index):
        return f"record {index}"


def test_a_record_that_cannot_be_read_is_named_once():
    report = inspect_split(Damaged())
    assert report.labels_read == 4 and report.unreadable == ("record 3 (checksum)",)
    assert (report.smallest_class, report.largest_class) == (1, 3) and report.shorter_side == (4, 4, 4)
    nothing = inspect_split(Damaged(), sample=1)  # record 0
    assert nothing.decoded == 1 and nothing.unreadable == ("record 3 (checksum)",)


def test_nothing_readable(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.jpg").write_text("no image")
    report = inspect_split(ImageFolderSource(tmp_path, "train"))
    assert report.shorter_side is None and report.decoded_unreadable == report.decoded == 1


def test_digits():
    report = inspect_split(DigitsSource("test"), sample=3)
    assert (report.images, report.labels_read, report.decoded, report.unreadable) == (360, 360, 3, ())
    assert report.smallest_class >= 33 and report.shorter_side == (8, 8, 8)


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
def test_published_dataset_by_tfds_name(name, expected):
    assert published_dataset(DataConfig(source="tfds", name=name), DigitsSource("test")) is expected


def make_classes(root, count):
    for wnid in range(count):
        folder = root / "train" / f"n{wnid:08}"
        folder.mkdir(parents=True)
        (folder / "0.JPEG").touch()
    return ImageFolderSource(root, "train")


def test_a_folder_of_a_thousand_wnids_is_imagenet(tmp_path):
    config = DataConfig(source="image_folder", data_dir=str(tmp_path))
    source = make_classes(tmp_path, 1000)
    assert published_dataset(config, source) is IMAGENET and has_wnid_classes(source)
    (tmp_path / "train" / "n00000999").rename(tmp_path / "train" / "cat")
    source = ImageFolderSource(tmp_path, "train")
    assert published_dataset(config, source) is None and not has_wnid_classes(source)


def test_a_folder_of_fewer_wnids_is_not(tmp_path):
    source = make_classes(tmp_path, 3)
    assert published_dataset(DataConfig(source="image_folder"), source) is None and has_wnid_classes(source)
    assert published_dataset(DataConfig(), DigitsSource("test")) is None


def test_images_of_a_split():
    tfds = DataConfig(source="tfds", name="imagenet2012", eval_split="validation")
    assert published_images(IMAGENET, tfds, train=True) == 1_281_167
    assert published_images(IMAGENET, tfds, train=False) == 50_000
    part = DataConfig(source="tfds", name="cifar10", train_split="train[:10%]")
    assert published_images(CIFAR, part, train=True) is None  # a part by choice
    assert published_images(CIFAR, part, train=False) == 10_000


def test_the_splits_of_a_folder_are_known_by_their_use():
    folder = DataConfig(source="image_folder", train_split="ILSVRC_train", eval_split="val")
    assert [published_images(IMAGENET, folder, train=train) for train in (True, False)] == [1_281_167, 50_000]
    same = DataConfig(source="image_folder", train_split="all", eval_split="all")
    assert published_images(IMAGENET, same, train=False) == 1_281_167


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
