"""The sizes that well-known datasets have when nothing is missing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Final

from top_jax.config import DataConfig
from top_jax.data.sources import ImageFolderSource, Source


@dataclasses.dataclass(frozen=True)
class OfficialDataset:
    """A published dataset: its name, classes, and images by TFDS's name of the split."""

    name: str
    classes: int
    images: Mapping[str, int]


# image-net.org, ILSVRC 2012, and cs.toronto.edu/~kriz/cifar.html; by TFDS name.
OFFICIAL: Final = {
    "imagenet2012": OfficialDataset("ImageNet-1K", 1000, {"train": 1_281_167, "validation": 50_000}),
    "cifar10": OfficialDataset("CIFAR-10", 10, {"train": 50_000, "test": 10_000}),
}
_WNID: Final = re.compile(r"n\d{8}")  # a WordNet id: how ImageNet's class folders are called


def official_dataset(config: DataConfig, source: Source) -> OfficialDataset | None:
    """Which published dataset `source` claims to be: by its TFDS name, or as a folder of 1,000 WordNet ids."""
    if config.source == "tfds":
        return OFFICIAL.get(re.split("[:/]", config.name or "")[0])
    if isinstance(source, ImageFolderSource) and has_wnid_classes(source):
        imagenet = OFFICIAL["imagenet2012"]
        return imagenet if source.num_classes == imagenet.classes else None
    return None


def has_wnid_classes(source: Source) -> bool:
    """Whether it is an image folder whose classes are all called as ImageNet's are."""
    return isinstance(source, ImageFolderSource) and all(_WNID.fullmatch(name) for name in source.classes)


def official_images(dataset: OfficialDataset, config: DataConfig, *, train: bool) -> int | None:
    """How many images the training or evaluation split of `config` should have.

    None where that is not said: a TFDS slice such as train[:10%] is a part by choice. The folders of splits are
    named by whoever made them, so those are known by what they are used for.
    """
    split = config.train_split if train else config.eval_split
    if config.source == "image_folder":
        split = "train" if split == config.train_split else "validation"
    return dataset.images.get(split)


def completeness(split: str, images: int, dataset: OfficialDataset, official: int) -> str:
    """How many of a published split's images are there, in words.

    Args:
        split: what to call it.
        images: how many it has.
        dataset: what it claims to be.
        official: how many it should have.
    """
    if images == official:
        return f"{split} has all {official:,} images of {dataset.name}"
    if images > official:
        return f"{split} has {images:,} images, {images - official:,} more than the {official:,} of {dataset.name}"
    if images < official / 2:
        return f"{split} has {images:,} of {official:,} images: a sample, not {dataset.name}"
    return f"{split} has {images:,} of {official:,} images: {official - images:,} of {dataset.name} are missing"
