"""The images to draw, the part of each that the model sees (at a higher resolution), and where its patches are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from top_jax.data import Source, transforms
from top_jax.data.transforms import center_crop_box
from top_jax.errors import InputError
from top_jax.models.sizes import BackboneConfig, MambaConfig
from top_jax.values import counted

LONG_SIDE = 512
"""Minimum length of a drawn photo's longer side, in pixels."""


class Photo(NamedTuple):
    """The photo that every map is drawn on.

    Attributes:
        pixels: uint8 `[h, w, 3]`; h and w are the same whole multiple of the model's input.
        size: (height, width) of the model's input in pixels, the unit of all that is drawn on the photo.
        grid: (rows, columns) of patches.
        patch: P, the side of a patch in pixels of the model's input.
        stride: the distance from one patch to the next, in the same unit.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    grid: tuple[int, int]
    patch: int
    stride: int

    @property
    def area(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of all cells, as `imshow` takes it.

        A cell is one stride by one stride around a patch's centre. Patches overlap if the stride is below P, but cells
        tile the image; then the image has a rim that belongs to no cell.
        """
        rim = (self.patch - self.stride) / 2
        rows, columns = self.grid
        return rim, rim + columns * self.stride, rim + rows * self.stride, rim

    def places(self) -> np.ndarray:
        """Returns the raster index of each drawn pixel's cell, int `[h, w]`; the rim belongs to the nearest cell."""
        left, _, _, top = self.area
        times = self.pixels.shape[0] // self.size[0]
        rows, columns = (
            np.clip((np.arange(pixels) / times - start) // self.stride, 0, cells - 1).astype(int)
            for pixels, start, cells in zip(self.pixels.shape[:2], (top, left), self.grid, strict=True)
        )
        return rows[:, None] * self.grid[1] + columns[None, :]

    def centres(self, places: np.ndarray) -> np.ndarray:
        """Returns (x, y) of the centres of the patches at raster `places`, float `[..., 2]`."""
        row, column = np.divmod(places, self.grid[1])
        return np.stack([column, row], axis=-1) * float(self.stride) + self.patch / 2


def crop_for_display(image: Image.Image, config: BackboneConfig, *, eval_crop: float) -> Photo:
    """Crops an image as evaluation does (`top_jax.data.transforms.resize_center_crop`), at a higher resolution.

    Args:
        image: RGB.
        config: sizes of the model.
        eval_crop: the share of the image that the run's evaluation keeps.

    Returns:
        The crop, made from the original pixels. An image of fewer pixels than are drawn is enlarged without smoothing.
    """
    height, width = config.img_size
    resized, box = center_crop_box(image.size, config.img_size, eval_crop=eval_crop)
    across, down = image.width / resized[0], image.height / resized[1]
    # Rounding may leave the box slightly outside the image, which PIL refuses.
    left, right = (min(max(side * across, 0.0), float(image.width)) for side in box[::2])
    top, bottom = (min(max(side * down, 0.0), float(image.height)) for side in box[1::2])
    times = math.ceil(LONG_SIDE / max(height, width))
    enlarged = right - left < width * times / 2
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    drawn = image.resize((width * times, height * times), method, box=(left, top, right, bottom))
    stride = config.stride if isinstance(config, MambaConfig) else config.patch_size
    return Photo(np.asarray(drawn), config.img_size, config.grid, config.patch_size, stride)


class Picture(NamedTuple):
    """An image to draw.

    Attributes:
        name: its name on the page.
        stem: the name of its files, without a suffix.
        image: RGB.
        label: index of its class; None if it is not known.
        place: its index in the source; None for a file.
    """

    name: str
    stem: str
    image: Image.Image
    label: int | None = None
    place: int | None = None


def of_files(files: Sequence[str], **decoding: Any) -> list[Picture]:
    """Reads image files, with the settings of `top_jax.data.transforms.decode`.

    Raises:
        InputError: a file is missing, or is not a complete image.
    """
    return [Picture(Path(file).name, Path(file).stem, transforms.read_image(file, **decoding)) for file in files]


def of_source(source: Source, count: int, **decoding: Any) -> list[Picture]:
    """Returns `count` evenly spaced images of a source, with the settings of `top_jax.data.transforms.decode`.

    Raises:
        InputError: the source has fewer images, or one of them cannot be read.
    """
    if count > len(source):
        raise InputError(
            f"--examples={count}, but {source.name} has {counted(len(source), 'image')}; pass a smaller number."
        )
    pictures = []
    for i in range(count):
        index = i * len(source) // count
        try:
            record = source[index]
            image = transforms.decode(record.image, **decoding)
        except transforms.DECODE_ERRORS as error:
            raise InputError(
                f"cannot read image {source.describe(index)} ({error}); pass another --examples."
            ) from error
        label = record.label if isinstance(record.label, int) else None  # a label map is drawn, not named
        pictures.append(Picture(f"{source.name}, image {index}", f"image_{index}", image, label, index))
    return pictures


def stems_of(pictures: Sequence[Picture]) -> list[str]:
    """Returns the stems of the files to write, all numbered if two would be the same."""
    stems = [picture.stem for picture in pictures]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number}_{stem}" for number, stem in enumerate(stems, start=1)]
