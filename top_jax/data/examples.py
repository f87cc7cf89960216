"""Reads, decodes and transforms one image: one row of a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypedDict

import numpy as np
from PIL import Image

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import rand_augment, transforms
from top_jax.data.sources.base import Source, check_label
from top_jax.errors import InputError
from top_jax.values import LARGEST_SIDE

PADDING_INDEX = -1
DEFAULT_AUGMENT = AugmentConfig()


class Example(TypedDict):
    """One row of a batch; `mask` is 0 for a row that must not be counted (padding, or an unreadable image)."""

    image: np.ndarray  # uint8 [H, W, 3]
    label: np.int32
    mask: np.float32
    index: np.int64  # index in the source; -1 for padding
    ignored: np.int8  # the EXIF orientation if it was ignored, else 0; `Batches` removes this field


@dataclasses.dataclass(frozen=True)
class ExampleReader:
    """Turns the images of a source into examples; picklable, so that Grain can send it to worker processes."""

    source: Source
    config: DataConfig
    size: transforms.Size
    augment: AugmentConfig = DEFAULT_AUGMENT

    def __post_init__(self) -> None:
        """Raises InputError for an impossible setting."""
        config = self.config
        self._rand_augment  # noqa: B018  parsed now, so that a mistake in it is an error at once
        if config.train_transform not in TRAIN_TRANSFORMS:
            known = ", ".join(TRAIN_TRANSFORMS)
            raise InputError(f"unknown config.data.train_transform={config.train_transform!r}; use one of {known}.")
        if max(self.size) / config.eval_crop > LARGEST_SIDE:
            raise InputError(
                f"config.data.eval_crop={config.eval_crop} resizes images to {max(self.size) / config.eval_crop:.3g} "
                f"pixels before the crop; needed: at most {LARGEST_SIDE}. A usual value is 0.875."
            )

    def random(self, index: int, rng: np.random.Generator) -> Example:
        """Returns image `index`, cropped and augmented for training; flip, erasing and mixing follow on the device.

        timm flips before RandAugment; here the device flips after it. The distribution of results is the same, because
        the signs of rotations, shears and shifts are symmetric. The exception is ShearY: it keeps the image's left edge
        in place, and for a flipped image the right edge.
        """

        def change(image: Image.Image) -> Image.Image:
            image = TRAIN_TRANSFORMS[self.config.train_transform](image, self.size, rng, self.config)
            if self._rand_augment is not None:
                image = self._rand_augment(image, rng, rand_augment.fill_of(self.config.mean))
            strength = self.augment.color_jitter
            return transforms.color_jitter(image, rng, strength) if strength else image

        return self._read(index, change)

    @functools.cached_property
    def _rand_augment(self) -> rand_augment.RandAugment | None:
        notation = self.augment.rand_augment
        return None if notation is None else rand_augment.parse(notation)

    def fixed(self, index: int) -> Example:
        """Returns image `index` as evaluation uses it, or a padding row past the end of the source."""
        if index >= len(self.source):
            return self._blank(label=0, index=PADDING_INDEX)
        crop = functools.partial(transforms.resize_center_crop, size=self.size, eval_crop=self.config.eval_crop)
        return self._read(index, crop)

    def problem(self, index: int) -> str:
        """Returns a line that names image `index` and says why it cannot be read."""
        try:
            transforms.decode(self.source[index].image, **self.config.decoding())
        except transforms.DECODE_ERRORS as error:
            return f"{self.source.describe(index)} ({error})"
        return f"{self.source.describe(index)} (readable on a second try)"

    def _read(self, index: int, transform: Callable[[Image.Image], Image.Image]) -> Example:
        label = 0  # if the record itself cannot be read
        try:
            record = self.source[index]
            label = check_label(self.source, index, record.label)
            image = transforms.decode(record.image, **self.config.decoding())
        except transforms.DECODE_ERRORS as error:
            if self.config.on_corrupt == "skip":
                return self._blank(label, index)
            raise InputError(
                f"unreadable image {self.source.describe(index)} ({error}). Replace or remove it, or pass "
                "--config.data.on_corrupt=skip to train without it."
            ) from error
        ignored = np.int8(image.info.get(transforms.IGNORED, 0))
        pixels = np.asarray(transform(image))
        return Example(image=pixels, label=np.int32(label), mask=np.float32(1), index=np.int64(index), ignored=ignored)

    def _blank(self, label: int, index: int) -> Example:
        pixels = np.zeros((*self.size, 3), np.uint8)
        return Example(
            image=pixels, label=np.int32(label), mask=np.float32(0), index=np.int64(index), ignored=np.int8(0)
        )


def _random_resized_crop(
    image: Image.Image, size: transforms.Size, rng: np.random.Generator, config: DataConfig
) -> Image.Image:
    return transforms.random_resized_crop(image, size, rng, min_area=config.min_area)


def _shift_crop(image: Image.Image, size: transforms.Size, rng: np.random.Generator, config: DataConfig) -> Image.Image:
    return transforms.shift_crop(image, size, rng, shift=config.shift)


TRAIN_TRANSFORMS = {"random_resized_crop": _random_resized_crop, "shift_crop": _shift_crop}
