"""The images to draw: files, or examples of a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from top_jax.data import Source, transforms
from top_jax.errors import InputError


class Picture(NamedTuple):
    """An image to draw: what it is called on paper and as a file, and its label where that is known."""

    name: str
    stem: str
    image: Image.Image
    label: int | None = None


def of_files(files: Sequence[str]) -> list[Picture]:
    """Photos.

    Raises:
        InputError: a file that is not there, or is no complete image.
    """
    return [Picture(Path(file).name, Path(file).stem, transforms.read_image(file)) for file in files]


def of_source(source: Source, count: int) -> list[Picture]:
    """So many images of a source, evenly spread.

    Raises:
        InputError: more than it has, or one of them is unreadable.
    """
    if count > len(source):
        raise InputError(f"--examples={count}, but {source.name} has {len(source)} images; ask for fewer.")
    pictures = []
    for i in range(count):
        index = i * len(source) // count
        try:
            record = source[index]
            image = transforms.decode(record.image)
        except transforms.DECODE_ERRORS as error:
            raise InputError(f"unreadable image {source.describe(index)} ({error}); ask for another number.") from error
        pictures.append(Picture(f"{source.name}, image {index}", f"image_{index}", image, record.label))
    return pictures


def stems_of(pictures: Sequence[Picture]) -> list[str]:
    """Names of the files, numbered where two would have the same."""
    stems = [picture.stem for picture in pictures]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number}_{stem}" for number, stem in enumerate(stems, start=1)]
