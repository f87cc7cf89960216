"""The part of a photo that a model sees, at a resolution for people, and where the model's patches lie in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from top_jax.data.transforms import center_crop_box
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
