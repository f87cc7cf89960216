"""What is in a split: counts, images per class, and whether a sample of it can be decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from top_jax.data import transforms
from top_jax.data.sources import DigitsSource, ImageFolderSource, Source

MOST_LABELS: Final = 10_000  # read where they lie inside the records: all of ImageNet's would take many minutes


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What was found in one split.

    Attributes:
        source: its name.
        images: how many there are.
        classes: how many labels there may be.
        labels_read: images whose label was looked at, evenly spread over the split; the next three are of these.
        smallest_class: images of the class that has the fewest, 0 where a class has none.
        largest_class: images of the class that has the most.
        classes_without_images: how many have none.
        decoded: images that were decoded to try them, evenly spread over the split.
        decoded_unreadable: how many of these could not be.
        unreadable: each image that could not be read or decoded, with its place and what was wrong.
        shorter_side: least, median and largest number of pixels on the shorter side of those that could; None where
            none could.
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


def records_to_read(source: Source, sample: int) -> int:
    """How many images `inspect_split` opens, for a progress bar."""
    labels = 0 if isinstance(source, DigitsSource | ImageFolderSource) else min(MOST_LABELS, len(source))
    return labels + min(sample, len(source))


def inspect_split(
    source: Source, *, sample: int = 64, on_image: Callable[[int], None] = lambda images: None
) -> SplitReport:
    """Looks at a split without reading all of it.

    Labels are counted without decoding an image: all of them where the source knows them without its images (an image
    folder, the digits), and those of at most `MOST_LABELS` records, evenly spread, of TFDS.

    Args:
        source: the split.
        sample: images to decode; fewer where there are fewer.
        on_image: called with 1 after each image that was opened.
    """
    broken: dict[int, str] = {}
    labels = _labels(source, broken, on_image)
    per_class = np.bincount(labels, minlength=source.num_classes)
    chosen, sides = spread(len(source), sample), []
    for index in chosen:
        try:
            sides.append(min(transforms.decode(source[index].image).size))
        except transforms.DECODE_ERRORS as error:
            broken[index] = f"{source.describe(index)} ({error})"
        on_image(1)
    return SplitReport(
        source=source.name,
        images=len(source),
        classes=source.num_classes,
        labels_read=len(labels),
        smallest_class=int(per_class.min()),
        largest_class=int(per_class.max()),
        classes_without_images=int((per_class == 0).sum()),
        decoded=len(chosen),
        decoded_unreadable=len(chosen) - len(sides),
        unreadable=tuple(broken[index] for index in sorted(broken)),
        shorter_side=(min(sides), int(np.median(sides)), max(sides)) if sides else None,
    )


def spread(images: int, count: int) -> list[int]:
    """At most `count` of the indices 0 .. images - 1, evenly spread, the first and the last among them."""
    return np.linspace(0, images - 1, min(count, images)).round().astype(int).tolist()


def _labels(source: Source, broken: dict[int, str], on_image: Callable[[int], None]) -> np.ndarray:
    """Labels int [n]; records that cannot be read go to `broken`."""
    if isinstance(source, DigitsSource | ImageFolderSource):
        return source.labels

    def read() -> Iterator[int]:
        for index in spread(len(source), MOST_LABELS):
            try:
                yield source[index].label
            except transforms.DECODE_ERRORS as error:
                broken[index] = f"{source.describe(index)} ({error})"
            on_image(1)

    return np.fromiter(read(), np.int64)
