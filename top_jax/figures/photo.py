"""The part of a photo that a model sees, at a resolution for people, and where the model's patches lie in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from top_jax.data import Source, transforms
from top_jax.data.transforms import center_crop_box
from top_jax.errors import InputError
from top_jax.models.sizes import BackboneConfig, MambaConfig

LONG_SIDE = 512
"""Pixels of a drawn photo's longer side, at least."""


class Photo(NamedTuple):
    """What is drawn under every map.

    Attributes:
        pixels: uint8 `[h, w, 3]`, a whole multiple of the model's input in height and width.
        size: (height, width) of the model's input in pixels, the unit of everything that is drawn on it.
        grid: rows and columns of patches.
        patch: P, side of a patch.
        stride: from patch to patch.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    grid: tuple[int, int]
    patch: int
    stride: int

    @property
    def area(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of the cells, for `imshow`: one stride by one stride around each patch's centre.

        Where patches overlap (a stride below P), cells are what tiles the image; a rim belongs to no cell.
        """
        rim = (self.patch - self.stride) / 2
        rows, columns = self.grid
        return rim, rim + columns * self.stride, rim + rows * self.stride, rim

    def places(self) -> np.ndarray:
        """int `[h, w]`: the raster place of the cell in which each drawn pixel lies; the rim is its neighbour's."""
        left, _, _, top = self.area
        times = self.pixels.shape[0] // self.size[0]
        rows, columns = (
            np.clip((np.arange(pixels) / times - start) // self.stride, 0, cells - 1).astype(int)
            for pixels, start, cells in zip(self.pixels.shape[:2], (top, left), self.grid, strict=True)
        )
        return rows[:, None] * self.grid[1] + columns[None, :]

    def centres(self, places: np.ndarray) -> np.ndarray:
        """(x, y) of the centres of the patches at raster `places`: float `[..., 2]`."""
        row, column = np.divmod(places, self.grid[1])
        return np.stack([column, row], axis=-1) * float(self.stride) + self.patch / 2


def crop_for_display(image: Image.Image, config: BackboneConfig, *, eval_crop: float) -> Photo:
    """The photo as evaluation crops it (`top_jax.data.transforms.resize_center_crop`), but not at the model's size.

    Args:
        image: RGB.
        config: of the model.
        eval_crop: of the run's data.

    Returns:
        The crop, of the original pixels. Where there are fewer than are drawn they stay squares, to be seen as such.
    """
    height, width = config.img_size
    resized, box = center_crop_box(image.size, config.img_size, eval_crop=eval_crop)
    across, down = image.width / resized[0], image.height / resized[1]
    # Rounding may leave the box a hair outside the image, which PIL refuses.
    left, right = (min(max(side * across, 0.0), float(image.width)) for side in box[::2])
    top, bottom = (min(max(side * down, 0.0), float(image.height)) for side in box[1::2])
    times = math.ceil(LONG_SIDE / max(height, width))
    enlarged = right - left < width * times / 2
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    drawn = image.resize((width * times, height * times), method, box=(left, top, right, bottom))
    stride = config.stride if isinstance(config, MambaConfig) else config.patch_size
    return Photo(np.asarray(drawn), config.img_size, config.grid, config.patch_size, stride)


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
