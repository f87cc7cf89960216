"""Segments images of any size with a segmenter that reads windows of one size (slide), or whole images (whole).

    image [B, H, W, 3] -> windows -> logits of each -> resized to the window, averaged where windows overlap ->
    resized to the requested size -> labels

Whole inference is the case of one window. Everything after the model is linear and separable: each window has one
matrix for rows and one for columns. So labels are computed a few rows at a time, without logits of the image's size.

Source: mmseg 0.29.1, segmentors/encoder_decoder.py (`slide_inference`, `whole_inference`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.models.resizing import bilinear_matrix, combined, taps_by_rows, taps_of
from top_jax.typing import Array, Float, Images, PixelLabels

Size = tuple[int, int]


def window_starts(size: Size, crop: Size, stride: int) -> tuple[tuple[int, int], ...]:
    """Returns (top, left) of each window, row by row; the last ones are moved back into the image."""
    tops, lefts = (_starts(*sides, stride) for sides in zip(size, crop, strict=True))
    return tuple((top, left) for top in tops for left in lefts)


def cut_windows(images: Images, crop: Size, stride: int) -> list[Float[Array, "B h w 3"]]:
    """Cuts images `[B, H, W, 3]` into windows `[B, *crop, 3]`, in the order of `window_starts`.

    An image that is smaller than a window is padded with zeros on the right and at the bottom.
    """
    height, width = images.shape[1:3]
    missing = [(0, max(0, side - have)) for side, have in zip(crop, (height, width), strict=True)]
    images = jnp.pad(images, ((0, 0), *missing, (0, 0)))
    starts = window_starts((height, width), crop, stride)
    return [images[:, top : top + crop[0], left : left + crop[1]] for top, left in starts]


def labels_of_windows(
    logits: Sequence[Float[Array, "B h w classes"]], image_size: Size, crop: Size, stride: int, size: Size
) -> PixelLabels:
    """Returns the class of each pixel, by the mean of the logits of the windows that it lies in.

    Args:
        logits: float32, of each window, in the order of `window_starts`, at the resolution of the decode head.
        image_size: (height, width) that was cut into windows.
        crop: (height, width) of a window; `image_size` for whole inference.
        stride: pixels from one window to the next.
        size: (height, width) of the labels.

    Returns:
        int32 `[B, *size]`.
    """
    rows, columns = (
        _matrices(old, image, side, stride, new)
        for old, image, side, new in zip(logits[0].shape[1:3], image_size, crop, size, strict=True)
    )
    row_taps = [taps_by_rows(matrix) for matrix in rows]
    column_taps = [taps_of(matrix) for matrix in columns]
    count = len(columns)

    def classes(taps: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
        total = 0.0
        for column, (index, share) in enumerate(column_taps):
            strip = [combined(logits[row * count + column], *taps[row], axis=1) for row in range(len(rows))]
            total = total + combined(functools.reduce(jnp.add, strip), index, share, axis=2)
        return jnp.argmax(jnp.asarray(total), axis=-1).astype(jnp.int32)

    found = jax.lax.map(classes, row_taps)  # [steps, B, rows, W]
    return jnp.moveaxis(found, 0, 1).reshape(len(logits[0]), -1, size[1])[:, : size[0]]


def _starts(length: int, crop: int, stride: int) -> tuple[int, ...]:
    count = max(length - crop + stride - 1, 0) // stride + 1
    return tuple(min(number * stride, max(length - crop, 0)) for number in range(count))


@functools.lru_cache(maxsize=64)
def _matrices(old: int, length: int, crop: int, stride: int, new: int) -> tuple[np.ndarray, ...]:
    """Returns for each window along one axis the `[new, old]` matrix from its logits to the labels."""
    starts = _starts(length, crop, stride)
    to_window, to_labels = bilinear_matrix(old, crop), bilinear_matrix(length, new)
    inside = [slice(start, min(start + crop, length)) for start in starts]
    overlaps = np.zeros(length)
    for part in inside:
        overlaps[part] += 1
    return tuple((to_labels[:, part] / overlaps[part]) @ to_window[: part.stop - part.start] for part in inside)
