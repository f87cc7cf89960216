"""Inspects a split for `doctor --data`: counts, images per class, a decoded sample, counts of published datasets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from top_jax.config import DataConfig
from top_jax.data import transforms
from top_jax.data.segmentation import IGNORED, SegmentationReader
from top_jax.data.sources import DigitsSource, HuggingFaceSource, ImageFolderSource, Source, is_dense
from top_jax.data.sources.segmentation_folder import ADE20K_CLASSES, ADE20K_IMAGES
from top_jax.errors import InputError

MOST_MAPS: Final = 2_000  # label maps to read, at 5 ms each
MOST_LABELS: Final = 10_000  # labels to read from inside records: reading all of ImageNet's would take many minutes
LABELLED: Final = (DigitsSource, HuggingFaceSource, ImageFolderSource)  # sources that hold their labels in an array
DEFAULT: Final = DataConfig()
_WNID: Final = re.compile(r"n\d{8}")  # a WordNet id, the name of an ImageNet class folder


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """Contents of one split.

    Where pixels are labelled, an image counts for every class that it shows.

    Attributes:
        source: name of the source.
        images: number of images.
        classes: number of classes.
        labels_read: number of images whose label was read, evenly spread over the split; the next three count these.
        smallest_class: images of the smallest class, 0 if a class has none.
        largest_class: images of the largest class.
        classes_without_images: number of classes that have no image.
        decoded: number of images that were decoded as a test, evenly spread over the split.
        decoded_unreadable: number of these that could not be decoded.
        unreadable: for each image that could not be read or decoded, its path or name and the reason.
        shorter_side: smallest, median and largest shorter side of the decoded images, in pixels; None if there are
            none.
        ignored: share of the pixels of the labels read that are not counted; None where images are labelled.
        refused: for each label map that is unusable or differs in size from its image, the reason.
    """

    source: str
    images: int
    classes: int
    labels_read: int
    smallest_class: int
    largest_class: int
    classes_without_images: int
    decoded: int
    decoded_unreadable: int
    unreadable: tuple[str, ...]
    shorter_side: tuple[int, int, int] | None
    ignored: float | None = None
    refused: tuple[str, ...] = ()


def records_to_read(source: Source, sample: int) -> int:
    """Returns the number of images that `inspect_split` opens, for a progress bar."""
    labels = 0 if isinstance(source, LABELLED) else min(MOST_MAPS if is_dense(source) else MOST_LABELS, len(source))
    return labels + min(sample, len(source))


def inspect_split(
    source: Source,
    *,
    sample: int = 64,
    config: DataConfig = DEFAULT,
    on_image: Callable[[int], None] = lambda images: None,
) -> SplitReport:
    """Inspects a split without reading all of it.

    All labels are counted if the source knows them without reading its images (an image folder, the digits). Otherwise
    those of at most `MOST_LABELS` records, or `MOST_MAPS` label maps, are counted, evenly spread.

    Args:
        source: the split.
        sample: largest number of images to decode.
        config: the largest number of pixels that counts as readable, and what the values of label maps mean.
        on_image: called with 1 after each opened image.
    """
    broken: dict[int, str] = {}
    refused: dict[int, str] = {}
    reader, ignored = None, None
    if is_dense(source):
        reader = SegmentationReader(source, config, (1, 1))
        per_class, ignored, read = _maps(reader, broken, refused, on_image)
    else:
        labels = _labels(source, broken, on_image)
        per_class, read = np.bincount(labels, minlength=source.num_classes), len(labels)
    chosen, sides = spread(len(source), sample), []
    for index in chosen:
        try:
            image = transforms.decode(source[index].image, **config.decoding())
            sides.append(min(image.size))
            if reader is not None and index not in refused:
                reader.check_size(index, image, reader.source.label_size(index))
        except transforms.DECODE_ERRORS as error:
            broken.setdefault(index, f"{source.describe(index)} ({error})")
        except InputError as error:
            refused[index] = str(error)
        on_image(1)
    return SplitReport(
        source=source.name,
        images=len(source),
        classes=source.num_classes,
        labels_read=read,
        smallest_class=int(per_class.min()),
        largest_class=int(per_class.max()),
        classes_without_images=int((per_class == 0).sum()),
        decoded=len(chosen),
        decoded_unreadable=len(chosen) - len(sides),
        unreadable=tuple(broken[index] for index in sorted(broken)),
        shorter_side=(min(sides), int(np.median(sides)), max(sides)) if sides else None,
        ignored=ignored,
        refused=tuple(refused[index] for index in sorted(refused)),
    )


def _maps(
    reader: SegmentationReader, broken: dict[int, str], refused: dict[int, str], on_image: Callable[[int], None]
) -> tuple[np.ndarray, float, int]:
    """Returns the number of images that show each class, the share of ignored pixels, and the label maps read."""
    source = reader.source
    per_class, ignored, pixels, read = np.zeros(source.num_classes, np.int64), 0, 0, 0
    for index in spread(len(source), MOST_MAPS):
        try:
            classes = reader.classes(index)
        except transforms.DECODE_ERRORS as error:
            broken[index] = f"{source.describe_labels(index)} ({error})"
        except InputError as error:
            refused[index] = str(error)
        else:
            counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)
            per_class += counts[: source.num_classes] > 0
            ignored, pixels, read = ignored + int(counts[IGNORED]), pixels + classes.size, read + 1
        on_image(1)
    return per_class, ignored / max(pixels, 1), read


def spread(images: int, count: int) -> list[int]:
    """Returns at most `count` of the indices 0 .. images - 1, evenly spread, including the first and the last."""
    return np.linspace(0, images - 1, min(count, images)).round().astype(int).tolist()


def _labels(source: Source, broken: dict[int, str], on_image: Callable[[int], None]) -> np.ndarray:
    """Returns labels, int [n], and adds the records that cannot be read to `broken`."""
    if isinstance(source, LABELLED):
        return source.labels

    def read() -> Iterator[int]:
        for index in spread(len(source), MOST_LABELS):
            try:
                label = source[index].label
                if isinstance(label, int):
                    yield label
            except transforms.DECODE_ERRORS as error:
                broken[index] = f"{source.describe(index)} ({error})"
            on_image(1)

    return np.fromiter(read(), np.int64)


@dataclasses.dataclass(frozen=True)
class PublishedDataset:
    """A published dataset: its name, number of classes, and images of each split, by TFDS's name of the split."""

    name: str
    classes: int
    images: Mapping[str, int]


# By TFDS name, or by source. Sources: image-net.org, ILSVRC 2012, cs.toronto.edu/~kriz/cifar.html, and ADE20K's paper.
PUBLISHED: Final = {
    "imagenet2012": PublishedDataset("ImageNet-1K", 1000, {"train": 1_281_167, "validation": 50_000}),
    "cifar10": PublishedDataset("CIFAR-10", 10, {"train": 50_000, "test": 10_000}),
    "ade20k": PublishedDataset("ADE20K", ADE20K_CLASSES, ADE20K_IMAGES),
}


def published_dataset(config: DataConfig, source: Source) -> PublishedDataset | None:
    """Returns the published dataset that `source` claims to be: by its TFDS name, or as 1,000 WordNet id folders."""
    if config.source == "ade20k":
        return PUBLISHED["ade20k"]
    if config.source == "tfds":
        return PUBLISHED.get(re.split("[:/]", config.name or "")[0])
    if has_wnid_classes(source):
        imagenet = PUBLISHED["imagenet2012"]
        return imagenet if source.num_classes == imagenet.classes else None
    return None


def has_wnid_classes(source: Source) -> bool:
    """Returns whether the source is an image folder whose class names are all WordNet ids, as ImageNet's are."""
    return isinstance(source, ImageFolderSource) and all(_WNID.fullmatch(name) for name in source.classes)


def published_images(dataset: PublishedDataset, config: DataConfig, *, train: bool) -> int | None:
    """Returns the number of images that the training or evaluation split of `config` should have.

    The result is None for a TFDS slice such as train[:10%], which is incomplete on purpose. Users choose the names of
    split folders, so those are identified by their use in `config`.
    """
    split = config.train_split if train else config.eval_split
    if config.source == "image_folder":
        split = "train" if split == config.train_split else "validation"
    return dataset.images.get(split)


def completeness(split: str, images: int, dataset: PublishedDataset, published: int) -> str:
    """Describes how many images of a published split are present.

    Args:
        split: name of the split for the message.
        images: number of images found.
        dataset: the published dataset.
        published: number of images that the split should have.
    """
    if images == published:
        return f"{split} has all {published:,} images of {dataset.name}"
    if images > published:
        return f"{split} has {images:,} images, {images - published:,} more than the {published:,} of {dataset.name}"
    if images < published / 2:
        return f"{split} has {images:,} of {published:,} images: a sample, not {dataset.name}"
    return f"{split} has {images:,} of {published:,} images: {published - images:,} of {dataset.name} are missing"
