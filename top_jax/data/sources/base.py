"""The interface of an image source."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import numpy as np

from top_jax.errors import InputError


class Record(NamedTuple):
    """One labelled image.

    Attributes:
        image: an encoded file, or pixels uint8 [H, W, 3].
        label: the class; of a `DenseSource`, a label map: an encoded PNG, or uint8 [H, W].
    """

    image: bytes | np.ndarray
    label: int | bytes | np.ndarray


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images. Picklable, because worker processes receive a copy."""

    @property
    def name(self) -> str:
        """Name for messages, such as "imagenet2012/train"."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """Reads image `index`. Raises OSError if its bytes are missing or damaged."""
        ...

    def describe(self, index: int) -> str:
        """Returns the path or name of image `index` for messages, even if the image cannot be read."""
        ...


@runtime_checkable
class DenseSource(Source, Protocol):
    """Random access to images with a label for each pixel, for segmentation.

    Label maps hold the values of their files; `config.data` says what these mean (`ignore_label`, `reduce_zero_label`).
    """

    def describe_labels(self, index: int, /) -> str:
        """Returns the path or name of label map `index` for messages, even if it cannot be read."""
        ...

    def label_size(self, index: int, /) -> tuple[int, int]:
        """Returns (height, width) of label map `index`, from its header. Raises OSError if that is damaged."""
        ...


def is_dense(source: Source) -> TypeGuard[DenseSource]:
    """Returns whether the source labels pixels, not images."""
    return isinstance(source, DenseSource)


def check_split(source: Source) -> None:
    """Checks, without reading an image, that a split can be used.

    Labels that the source holds in an array `labels` are checked here. Those of TFDS are inside the records: checking
    them once would read the whole split (150 GB for ImageNet), so each is checked when its record is read.

    Raises:
        InputError: the split has no image, or a label that is not a class.
    """
    if not len(source):
        raise InputError(f"{source.name} has no images; choose another split or data_dir.")
    labels = np.asarray(getattr(source, "labels", ()))
    wrong = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if wrong.size:
        check_label(source, int(wrong[0]), labels[wrong[0]].item())


def check_label(source: Source, index: int, label: int | bytes | np.ndarray) -> int:
    """Returns the label of record `index`; raises InputError unless it is one of the source's classes."""
    if isinstance(label, bytes | np.ndarray):
        raise InputError(
            f"{source.name} labels pixels, but one label per image is needed; choose a source for classification."
        )
    if 0 <= label < source.num_classes:
        return label
    raise InputError(
        f"{source.describe(index)} has the label {label}, but {source.name} has {source.num_classes} classes, "
        f"numbered 0 to {source.num_classes - 1}; correct the label, or prepare the data again."
    )


def check_classes(source: Source, num_classes: int, advice: str) -> None:
    """Raises InputError, ending in `advice`, unless the source has as many classes as the model, `num_classes`."""
    if source.num_classes != num_classes:
        raise InputError(f"{source.name} has {source.num_classes} classes and the model {num_classes}; {advice}.")
