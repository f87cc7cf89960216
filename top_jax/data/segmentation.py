"""Images with a label for each pixel, as training batches and evaluation batches.

`train_batches` and `eval_batches` of `top_jax.data` make the batches, for these sources as for any other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from typing import Final, TypedDict

import numpy as np
from PIL import Image

from top_jax.config import OF_CLASSIFIERS, AugmentConfig, DataConfig
from top_jax.data import segmentation_transforms as dense
from top_jax.data import transforms
from top_jax.data.examples import DEFAULT_AUGMENT, PADDING_INDEX
from top_jax.data.segmentation_transforms import IGNORED, LabelError
from top_jax.data.sources.base import DenseSource
from top_jax.data.transforms import Size
from top_jax.errors import InputError

__all__ = ["IGNORED", "EvalPlan", "PixelExample", "SegmentationReader", "prepare_image"]

MOST_AREA: Final = 2.0  # largest evaluation batch, relative to the pixels of batch_size crops
MOST_CHECKED: Final = 2_000  # images whose headers are read before a run starts


class PixelExample(TypedDict):
    """A row of a training batch, or a whole evaluation batch with a leading axis."""

    image: np.ndarray  # float32 [H, W, 3], normalised
    label: np.ndarray  # uint8 [H, W], 0 .. classes - 1 or IGNORED; in evaluation of the photograph's size
    mask: np.ndarray | np.float32  # 0: not to be counted (padding, or an unreadable image)
    index: np.ndarray | np.int64  # index in the source; -1 for padding
    ignored: np.ndarray | np.int8  # the EXIF orientation if it was ignored, else 0; `Batches` removes this field


class EvalPlan(TypedDict):
    """One evaluation batch: images of one size."""

    indices: list[int]  # indices in the source; -1 for padding
    size: Size  # size of the label maps


@dataclasses.dataclass(frozen=True)
class SegmentationReader:
    """Turns the images and label maps of a source into examples; picklable, for worker processes.

    Attributes:
        source: the images.
        config: sizes, what the values of label maps mean, and what to do with unreadable images.
        size: (height, width) of the training crop, in pixels.
        augment: flip, photometric distortion and repeats.
    """

    source: DenseSource
    config: DataConfig
    size: Size
    augment: AugmentConfig = DEFAULT_AUGMENT

    def __post_init__(self) -> None:
        """Raises InputError for an impossible setting."""
        if self.source.num_classes > IGNORED:
            raise InputError(
                f"{self.source.name} has {self.source.num_classes} classes; 8-bit labels have at most 255."
            )
        for name in OF_CLASSIFIERS:
            if getattr(self.augment, name):
                raise InputError(
                    f"config.augment.{name}={getattr(self.augment, name)} is for classifiers, and "
                    f"{self.source.name} labels pixels; set it to {getattr(DEFAULT_AUGMENT, name)}."
                )

    def random(self, index: int, rng: np.random.Generator) -> PixelExample:
        """Returns image `index` as training sees it: resized, cropped, flipped, distorted, normalised, padded.

        Each step and its order are those of mmsegmentation 0.29.1 (its ADE20K pipeline).
        """
        found = self._read(index)
        if found is None:
            return self._blank(index, self.size, self.size)
        pixels, labels, ignored = found
        smallest, largest = self.config.scale_range
        factor = rng.uniform(smallest, largest)
        size = dense.scaled_size(labels.shape, [max(1, int(side * factor)) for side in self.config.scale])
        window, labels = dense.random_crop(labels, size, self.size, rng, self.config.max_class_share)
        pixels = dense.resize_image(pixels, size, window)
        if self.augment.flip and rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if self.augment.photometric:
            pixels = dense.photometric(pixels, rng)
        image = dense.normalize_image(pixels, self.config.mean, self.config.std)
        image, labels = dense.pad(image, labels, self.size)
        return PixelExample(
            image=image, label=labels, mask=np.float32(1), index=np.int64(index), ignored=np.int8(ignored)
        )

    def fixed_batch(self, plan: EvalPlan) -> PixelExample:
        """Returns an evaluation batch: images at the test size, labels at the photographs' own."""
        size = test_size(plan["size"], self.config)
        rows = [self._fixed(index, plan["size"], size) for index in plan["indices"]]
        return PixelExample(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def _fixed(self, index: int, label_size: Size, size: Size) -> PixelExample:
        found = None if index == PADDING_INDEX else self._read(index)
        if found is None:
            return self._blank(index, size, label_size)
        pixels, labels, ignored = found
        return PixelExample(
            image=prepare_image(pixels, self.config),
            label=labels,
            mask=np.float32(1),
            index=np.int64(index),
            ignored=np.int8(ignored),
        )

    def plan(self, batch_size: int, rows_multiple: int) -> list[EvalPlan]:
        """Returns the evaluation batches: every image once, by size of label map, the largest first.

        Args:
            batch_size: largest number of images in a batch, a multiple of `rows_multiple`. Large images come in smaller
                batches: a batch has at most `MOST_AREA` times the pixels of `batch_size` crops, or `rows_multiple`
                images.
            rows_multiple: batches are padded to a multiple of this number of rows.
        """
        by_size: dict[Size, list[int]] = collections.defaultdict(list)
        for index in range(len(self.source)):
            try:
                by_size[self.source.label_size(index)].append(index)
            except transforms.DECODE_ERRORS:
                by_size[self.size].append(index)  # unreadable: a row of mask 0
            except LabelError as error:
                raise self._refused(index, error) from error
        batches = []
        most = MOST_AREA * batch_size * math.prod(self.size)
        for size in sorted(by_size, key=lambda size: (-math.prod(size), size)):
            area = max(math.prod(size), math.prod(test_size(size, self.config)))
            rows = max(1, min(batch_size, int(most / area)) // rows_multiple) * rows_multiple
            for start in range(0, len(by_size[size]), rows):
                indices = by_size[size][start : start + rows]
                indices += [PADDING_INDEX] * (-len(indices) % rows_multiple)
                batches.append(EvalPlan(indices=indices, size=size))
        return batches

    def pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns image `index`, uint8 [H, W, 3], and its classes, uint8 [H, W], both as stored.

        Raises:
            InputError: it cannot be read.
        """
        found = dataclasses.replace(self, config=dataclasses.replace(self.config, on_corrupt="raise"))._read(index)
        assert found is not None  # or `_read` has raised
        return found[0], found[1]

    def classes(self, index: int) -> np.ndarray:
        """Returns the classes of label map `index`, uint8 [H, W].

        Raises:
            OSError: it is missing or damaged.
            InputError: it is of another kind, or a value stands for no class.
        """
        return self._classes(index, self.source[index].label)

    def problem(self, index: int) -> str:
        """Returns a line that names image `index` or its label map, and says why it cannot be read."""
        try:
            record = self.source[index]
            transforms.decode(record.image, **self.config.decoding())
        except transforms.DECODE_ERRORS as error:
            return f"{self.source.describe(index)} ({error})"
        try:
            self._classes(index, record.label)
        except transforms.DECODE_ERRORS as error:
            return f"{self.source.describe_labels(index)} ({error})"
        return f"{self.source.describe(index)} (readable on a second try)"

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Returns pixels, classes and the EXIF orientation if it was ignored; None for an unreadable image."""
        try:
            record = self.source[index]
            image = transforms.decode(record.image, **self.config.decoding())
            labels = self._classes(index, record.label)
        except transforms.DECODE_ERRORS as error:
            if self.config.on_corrupt == "skip":
                return None
            raise InputError(
                f"unreadable: {self.problem(index)}. Replace or remove it, or pass --config.data.on_corrupt=skip to "
                "train without it."
            ) from error
        self.check_size(index, image, labels.shape)
        return np.asarray(image), labels, image.info.get(transforms.IGNORED, 0)

    def check_size(self, index: int, image: Image.Image, size: tuple[int, ...]) -> None:
        """Raises InputError unless an image has the (height, width) `size` of its label map."""
        if (image.height, image.width) == size:
            return
        turned = (image.width, image.height) == size and transforms.IGNORED in image.info
        remedy = "turn the image with --config.data.exif_rotate=True" if turned else "both must be of one size"
        raise InputError(
            f"{self.source.describe(index)} has {image.width} x {image.height} pixels, and "
            f"{self.source.describe_labels(index)} {size[1]} x {size[0]}; {remedy}."
        )

    def check_sizes(self) -> None:
        """Compares images with their label maps by the headers of at most `MOST_CHECKED` of them, evenly spread.

        Raises:
            InputError: an image and its label map differ in size.
        """
        if self.config.is_bundled:
            return  # of one size by construction, and drawn when they are read
        for index in range(0, len(self.source), -(-len(self.source) // MOST_CHECKED)):
            with contextlib.suppress(*transforms.DECODE_ERRORS, LabelError):  # evaluation names and counts them
                image, labels = self.source[index].image, self.source.label_size(index)
                size = image.shape[:2] if isinstance(image, np.ndarray) else transforms.header_size(image)
                if size != labels and not (self.config.exif_rotate and size[::-1] == labels):
                    self._read(index)  # the decoder may rotate the image, so check the decoded size

    def _classes(self, index: int, stored: int | bytes | np.ndarray) -> np.ndarray:
        try:
            if isinstance(stored, int):
                raise LabelError("is one number")
            return dense.to_classes(
                dense.decode_labels(stored),
                self.source.num_classes,
                ignore_label=self.config.ignore_label,
                reduce_zero_label=self.config.reduce_zero_label,
            )
        except LabelError as error:
            raise self._refused(index, error) from error

    def _refused(self, index: int, error: LabelError) -> InputError:
        return InputError(
            f"{self.source.describe_labels(index)} {error}. Needed: a PNG with 8-bit grey pixels that are class "
            "numbers; see config.data.ignore_label and reduce_zero_label."
        )

    def _blank(self, index: int, size: Size, label_size: Size) -> PixelExample:
        return PixelExample(
            image=np.zeros((*size, 3), np.float32),
            label=np.full(label_size, IGNORED, np.uint8),
            mask=np.float32(0),
            index=np.int64(index),
            ignored=np.int8(0),
        )


def test_size(size: Size, config: DataConfig) -> Size:
    """Returns (height, width) at which evaluation shows an image of `size` to the model."""
    return dense.multiple_size(dense.scaled_size(size, config.scale), config.size_divisor)


def prepare_image(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Resizes and normalises an image as evaluation does.

    The image is resized to fit `config.scale`, then stretched to multiples of `config.size_divisor` pixels.

    Args:
        pixels: uint8 [H, W, 3].
        config: the sizes, mean and standard deviation.

    Returns:
        float32 [h, w, 3].
    """
    size = dense.scaled_size(pixels.shape[:2], config.scale)
    resized = dense.resize_image(pixels, size)
    resized = dense.resize_image(resized, dense.multiple_size(size, config.size_divisor))
    return dense.normalize_image(resized, config.mean, config.std)
