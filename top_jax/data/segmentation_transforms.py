"""Transforms a photograph together with its label map, as mmsegmentation 0.29.1 does, on NumPy arrays.

Images are uint8 [H, W, 3] (RGB), label maps uint8 [H, W]. The arithmetic is OpenCV's for 8 bits (`resize`, `cvtColor`),
in NumPy: its fixed-point bilinear interpolation without antialias, and its HSV with hues in 0..179.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from top_jax.data.transforms import Size

IGNORED: Final = 255
"""The label of a pixel that does not count."""

CROP_TRIES: Final = 10  # redraws of a crop with too few classes
BRIGHTNESS: Final = 32.0  # largest change of pixel values, of 255
FACTORS: Final = (0.5, 1.5)  # range for contrast and for saturation
HUE: Final = 18  # largest change, in OpenCV's half degrees
_WEIGHT_BITS, _SHIFT = 11, 12  # fixed-point bits of OpenCV's interpolation, and of its division tables for HSV
_VECTOR: Final = 16  # bytes per vector of the OpenCV build that made the fixture; with AVX2, 32
# Red, green and blue in each sixth of the hues, as the largest (0), the smallest (1) or the channel between (2).
_SECTORS: Final = np.array([[0, 2, 1], [2, 0, 1], [1, 0, 2], [1, 2, 0], [2, 1, 0], [0, 1, 2]])


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def scaled_size(size: Size, scale: Sequence[int]) -> Size:
    """Returns the largest (height, width) of the same ratio within `scale`, as mmcv's `rescale_size` rounds it.

    Args:
        size: (height, width) of the image.
        scale: the longest allowed long side and short side, in pixels, in any order.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def multiple_size(size: Size, divisor: int) -> Size:
    """Returns `size` with both sides rounded up to multiples of `divisor` (mmseg's ResizeToMultiple)."""
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor


def resize_image(image: np.ndarray, size: Size, window: Window | None = None) -> np.ndarray:
    """Resizes as OpenCV's INTER_LINEAR for 8 bits: bilinear with half-pixel centres, without antialias.

    Args:
        image: uint8 [H, W, 3].
        size: (height, width) of the result.
        window: the part of the result to compute; None: all of it.

    Returns:
        uint8 [height, width, 3] of the window.
    """
    top, left, height, width = window or Window(0, 0, *size)
    if size == image.shape[:2]:
        return image[top : top + height, left : left + width]
    if (image.shape[0], image.shape[1]) == (2 * size[0], 2 * size[1]):  # OpenCV then takes INTER_AREA, which is faster
        part = image[2 * top : 2 * (top + height), 2 * left : 2 * (left + width)].astype(np.uint16)
        rows = part[::2] + part[1::2]
        return ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
    above, below, down = _neighbours(image.shape[0], size[0], top, height, at_edge=False)
    before, after, across = _neighbours(image.shape[1], size[1], left, width, at_edge=True)
    first = int(above.min())
    lines = image[first : int(below.max()) + 1]
    # [rows, 2, width * 3]: both neighbours of every pixel, so that the sum is one pass over contiguous memory.
    mixed = np.take(lines, before, axis=1) * across[0][:, None]
    mixed += np.take(lines, after, axis=1) * across[1][:, None]
    mixed >>= 4
    upper = mixed[above - first] * down[0][:, None, None]
    lower = mixed[below - first] * down[1][:, None, None]
    upper >>= 16
    lower >>= 16
    upper += lower
    upper += 2
    upper >>= 2
    return upper.astype(np.uint8)


def _neighbours(
    old: int, new: int, start: int, count: int, *, at_edge: bool
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns, for pixels start .. start + count of `new`, the two nearest pixels of `old`, and their weights.

    The weights are int32 in 0 .. 2048. Beyond the edge of `old`, its last pixel is repeated; with `at_edge` (for
    columns, as in OpenCV) one of the two has the whole weight.
    """
    scale = 1.0 / (new / old)
    places = ((np.arange(start, start + count) + 0.5) * scale - 0.5).astype(np.float32)
    before = np.floor(places).astype(np.int64)
    share = places - before.astype(np.float32)
    if at_edge:
        share[(before < 0) | (before >= old - 1)] = 0
    one = np.float32(1 << _WEIGHT_BITS)
    weights = [np.rint(part * one).astype(np.int32) for part in (np.float32(1) - share, share)]
    return np.clip(before, 0, old - 1), np.clip(before + 1, 0, old - 1), (weights[0], weights[1])


def resize_labels(labels: np.ndarray, size: Size, window: Window | None = None) -> np.ndarray:
    """Resizes as OpenCV's INTER_NEAREST: pixel i of the result is pixel floor(i * old / new).

    Args:
        labels: uint8 [H, W].
        size: (height, width) of the result.
        window: the part of the result to compute; None: all of it.
    """
    top, left, height, width = window or Window(0, 0, *size)
    rows = _floor_places(labels.shape[0], size[0])[top : top + height]
    columns = _floor_places(labels.shape[1], size[1])[left : left + width]
    return np.take(np.take(labels, rows, axis=0), columns, axis=1)


def _floor_places(old: int, new: int) -> np.ndarray:
    return np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)


def random_crop(
    labels: np.ndarray, size: Size, crop: Size, rng: np.random.Generator, max_share: float
) -> tuple[Window, np.ndarray]:
    """Draws a crop, up to 10 more times while one class has too many of its labelled pixels (mmseg's RandomCrop).

    Args:
        labels: uint8 [H, W], before resizing; `IGNORED` is not labelled.
        size: (height, width) of the resized image to crop from.
        crop: (height, width); a side that is longer than the image's is cut to it.
        rng: the random generator.
        max_share: the largest class must have less than this share of the labelled pixels; 1 accepts every crop.

    Returns:
        The crop, and its labels.
    """
    height, width = min(crop[0], size[0]), min(crop[1], size[1])

    def draw() -> tuple[Window, np.ndarray]:
        top = int(rng.integers(size[0] - height + 1))
        window = Window(top, int(rng.integers(size[1] - width + 1)), height, width)
        return window, resize_labels(labels, size, window)

    drawn = draw()
    if max_share >= 1:
        return drawn
    for _ in range(CROP_TRIES):
        counts = np.bincount(drawn[1].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_share:
            break
        drawn = draw()
    return drawn


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 0.5 (mmseg's PhotoMetricDistortion)."""
    if rng.random() < 0.5:
        image = brightness(image, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    factor = rng.uniform(*FACTORS) if rng.random() < 0.5 else None
    if factor is not None and contrast_first:
        image = contrast(image, factor)
    saturate = rng.uniform(*FACTORS) if rng.random() < 0.5 else None
    turn = int(rng.integers(-HUE, HUE)) if rng.random() < 0.5 else None
    if saturate is not None:
        image = saturation(image, saturate)
    if turn is not None:
        image = hue(image, turn)
    if factor is not None and not contrast_first:
        image = contrast(image, factor)
    return image


def brightness(image: np.ndarray, addition: float) -> np.ndarray:
    """Adds to every value, cut to 0..255 and rounded down."""
    return np.take(_table(1.0, addition), image)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies every value, cut to 0..255 and rounded down."""
    return np.take(_table(factor, 0.0), image)


def _table(factor: float, addition: float) -> np.ndarray:
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(addition)
    return np.clip(values, 0, 255).astype(np.uint8)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the saturation, cut to 0..255 and rounded down."""
    hues, saturations, values = _to_hsv(image)
    return _from_hsv(hues, np.take(_table(factor, 0.0), saturations), values)


def hue(image: np.ndarray, turn: int) -> np.ndarray:
    """Adds to the hue, in half degrees and modulo 180."""
    hues, saturations, values = _to_hsv(image)
    return _from_hsv((hues + turn) % 180, saturations, values)


@functools.cache
def _divisions() -> tuple[np.ndarray, np.ndarray]:
    """Returns 255 / i and 30 / i in fixed point, int32 [256], for i in 0..255; 0 for 0."""
    numbers = np.maximum(np.arange(256), 1)
    tables = [np.rint((top << _SHIFT) / (times * numbers)).astype(np.int32) for top, times in ((255, 1.0), (180, 6.0))]
    for table in tables:
        table[0] = 0
    return tables[0], tables[1]


def _to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hue in 0..179 (int32), saturation and value (uint8), each [H, W], as OpenCV's RGB2HSV."""
    of_value, of_range = _divisions()
    red, green, blue = (np.ascontiguousarray(image[..., channel]) for channel in range(3))
    values = np.maximum(np.maximum(red, green), blue)
    ranges = values - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturations = ((np.take(of_value, values) * ranges + half) >> _SHIFT).astype(np.uint8)
    r, g, b, span = (channel.astype(np.int16) for channel in (red, green, blue, ranges))
    place = np.where(values == red, g - b, np.where(values == green, b - r + 2 * span, r - g + 4 * span))
    hues = (np.take(of_range, ranges) * place + half) >> _SHIFT
    hues += 180 * (hues < 0)
    return hues, saturations, values


@functools.cache
def _missing() -> np.ndarray:
    """Returns how much of the saturation red, green and blue lack at each hue, float64 [3, 180] of float32 values."""
    place = np.arange(180, dtype=np.float32) * np.float32(6 / 180)
    sector = place.astype(np.intp)
    place -= sector.astype(np.float32)
    place = np.where(sector % 2 == 0, np.float32(1) - place, place)
    amounts = np.stack([np.zeros(180), np.ones(180), place])  # for the largest, smallest and middle channel
    return amounts[_SECTORS[sector].T, np.arange(180)]


def _from_hsv(hues: np.ndarray, saturations: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns RGB, uint8 [H, W, 3], as OpenCV's HSV2RGB.

    Its vectors take 1 - a b as one rounded operation and cut the result to an integer. The last columns of a row, which
    fill no vector, are rounded instead.
    """
    one, unit = np.float32(1), np.float32(1 / 255)
    share, value = (saturations * unit).astype(np.float64), values * unit
    tail = values.shape[1] - values.shape[1] % _VECTOR
    image = np.empty((*values.shape, 3), np.uint8)
    for channel, missing in enumerate(_missing()):
        part = (one - share * np.take(missing, hues)).astype(np.float32)
        part *= value
        part *= np.float32(255)
        np.rint(part[:, tail:], out=part[:, tail:])
        image[..., channel] = part
    return image


def normalize_image(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Returns (x - 255 mean) / (255 std) per channel, float32 [H, W, 3], in the order of mmcv's `imnormalize`."""
    result = np.empty(image.shape, np.float32)
    for channel, table in enumerate(_normalized(tuple(mean), tuple(std))):
        result[..., channel] = np.take(table, image[..., channel])
    return result


@functools.cache
def _normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Returns the normalised form of each value and channel, float32 [3, 256]."""
    centred = np.arange(256, dtype=np.float32) - np.array([[255 * value] for value in mean], np.float32)
    scale = 1 / np.array([[255 * value] for value in std], np.float32).astype(np.float64)
    return (centred * scale).astype(np.float32)


def pad(image: np.ndarray, labels: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Pads at the bottom and on the right: the normalised image with 0, its labels with `IGNORED`."""
    if labels.shape == size:
        return image, labels
    below, right = size[0] - labels.shape[0], size[1] - labels.shape[1]
    return (
        np.pad(image, ((0, below), (0, right), (0, 0))),
        np.pad(labels, ((0, below), (0, right)), constant_values=IGNORED),
    )


class LabelError(ValueError):
    """Raised for a label map that is intact but unusable; the message gives the reason without the file's name."""


_PNG: Final = b"\x89PNG\r\n\x1a\n"
_COLOURS: Final = {2: "RGB", 3: "palette", 4: "grey with transparency", 6: "RGB with transparency"}  # in a PNG's header
_GREY: Final = 0


def png_size(header: bytes) -> Size:
    """Returns (height, width) of a label PNG from its first 33 bytes.

    Raises:
        OSError: the header is damaged.
        LabelError: it is not a PNG, or has no 8-bit grey pixels.
    """
    if not header:
        raise OSError("the file is empty")
    if not header.startswith(_PNG):
        raise LabelError("is no PNG")
    if len(header) < 26 or header[12:16] != b"IHDR":
        raise OSError("the PNG's header is damaged")
    bits, kind = header[24], header[25]
    if kind != _GREY:
        hint = {
            2: "; colours are how ADE20K stores its instance annotations",
            3: "; if they are class numbers: Image.fromarray(np.asarray(Image.open(FILE))).save(FILE)",
        }
        raise LabelError(f"has {_COLOURS.get(kind, 'unknown')} pixels{hint.get(kind, '')}")
    if bits != 8:
        raise LabelError(f"has {bits}-bit pixels")
    return int.from_bytes(header[20:24]), int.from_bytes(header[16:20])


def decode_labels(labels: bytes | np.ndarray) -> np.ndarray:
    """Decodes a label PNG of 8-bit grey, or checks uint8 [H, W]; values stay as in the file.

    Raises:
        OSError: the bytes are damaged.
        LabelError: they are not a PNG, or one with other pixels.
    """
    if isinstance(labels, np.ndarray):
        if labels.dtype != np.uint8 or labels.ndim != 2 or not labels.size:
            raise LabelError(f"is {labels.dtype} {list(labels.shape)}")
        return labels
    png_size(labels)
    try:
        with Image.open(io.BytesIO(labels), formats=("PNG",)) as encoded:
            return np.asarray(encoded)
    except Exception as error:  # as in `transforms.decode`
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def to_classes(labels: np.ndarray, num_classes: int, *, ignore_label: int, reduce_zero_label: bool) -> np.ndarray:
    """Returns the classes 0 .. num_classes - 1 and `IGNORED` of a file's values, uint8 [H, W].

    Args:
        labels: uint8 [H, W] as stored. 255 is always ignored.
        num_classes: number of classes, at most 255.
        ignore_label: another value that is ignored.
        reduce_zero_label: 0 is ignored too, and class c is stored as c + 1, as in ADE20K.

    Raises:
        LabelError: a value stands for no class.
    """
    classes, known = _classes(num_classes, ignore_label, reduce_zero_label)
    found = np.bincount(labels.ravel(), minlength=256)
    if (unknown := np.flatnonzero((found > 0) & ~known)).size:
        first = 1 if reduce_zero_label else 0
        aside = ", ".join(map(str, sorted({*([0] if reduce_zero_label else []), ignore_label, IGNORED})))
        raise LabelError(
            f"has the value {unknown[0]} in {found[unknown[0]]:,} pixels, but the {num_classes} classes are "
            f"{first} to {first + num_classes - 1} ({aside}: ignored)"
        )
    return np.take(classes, labels)


@functools.cache
def _classes(num_classes: int, ignore_label: int, reduce_zero_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the class of each stored value, uint8 [256], and whether it stands for a class or for `IGNORED`."""
    values = np.arange(256)
    classes = np.where((values == ignore_label) | (values == IGNORED), IGNORED, values)
    if reduce_zero_label:
        classes = np.where((classes == 0) | (classes == IGNORED), IGNORED, classes - 1)
    return classes.astype(np.uint8), (classes < num_classes) | (classes == IGNORED)
