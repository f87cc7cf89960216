"""Turns encoded images into the model's pixels: PIL images in and out, random only through the given generator.

A `size` is (height, width) of the model's input in pixels. Images are resized by PIL's bicubic with antialias, as in
the official recipes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError

from top_jax.config import IMAGENET_MEAN, IMAGENET_STD
from top_jax.errors import InputError

Size = tuple[int, int]

CROP_TRIES = 10
ASPECT_RATIOS = (3 / 4, 4 / 3)
# PIL raises OSError for a file that is no image or is truncated, and the others for damage inside.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Decodes a file's bytes, or wraps uint8 [H, W, 3], as an RGB image; ignores EXIF orientation, as torchvision does.

    Raises:
        OSError and the others in DECODE_ERRORS: the bytes are not a complete image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(io.BytesIO(image)) as encoded:
            return encoded.convert("RGB")
    except UnidentifiedImageError:  # its message names the BytesIO; callers name the file
        raise UnidentifiedImageError("no image format that Pillow knows") from None


def read_image(file: str | Path) -> Image.Image:
    """Reads and decodes an image file, as `decode`.

    Raises:
        InputError: there is no such file, or it is not a complete image.
    """
    try:
        return decode(Path(file).read_bytes())
    except FileNotFoundError:
        raise InputError(f"no image file {file}.") from None
    except DECODE_ERRORS as error:
        raise InputError(f"cannot read {file} as an image: {error}") from error


def random_resized_crop(
    image: Image.Image, size: Size, rng: np.random.Generator, *, min_area: float = 0.08
) -> Image.Image:
    """Crops a random part of the image and resizes it to `size`: torchvision's RandomResizedCrop.

    The part's share of the area is uniform in (min_area, 1), its aspect ratio log-uniform in 3/4 .. 4/3. If none of
    ten draws fits into the image, the largest central part of an allowed ratio is taken.
    """
    width, height = image.size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            break
    else:
        aspect = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
        crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    # Crop, then resize: with resize(box=...) the filter would use pixels outside the box.
    part = image.crop((left, top, left + crop_width, top + crop_height))
    return part.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def shift_crop(image: Image.Image, size: Size, rng: np.random.Generator, *, shift: int = 4) -> Image.Image:
    """Resizes the image to `size` and moves it by up to `shift` pixels each way over black: CIFAR's pad and crop."""
    image = resize_center_crop(image, size, eval_crop=1.0)
    top, left = (int(moved) for moved in rng.integers(-shift, shift, size=2, endpoint=True))
    return image.crop((left, top, left + size[1], top + size[0]))  # PIL pads with zeros


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Changes brightness, contrast and saturation in random order, by factors uniform in 1 - strength .. 1 + strength.

    Equals torchvision's ColorJitter(strength, strength, strength), for a strength in [0, 1].
    """
    enhancements = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(len(enhancements)):
        image = enhancements[place](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def resize_center_crop(image: Image.Image, size: Size, *, eval_crop: float = 0.875) -> Image.Image:
    """Resizes the image so that it just covers `size` / `eval_crop`, and crops the centre (by default 256 and 224).

    With `eval_crop` 1, an image of that size keeps its pixels.
    """
    resized, box = center_crop_box(image.size, size, eval_crop=eval_crop)
    return image.resize(resized, Image.Resampling.BICUBIC).crop(box)


def center_crop_box(
    image_size: tuple[int, int], size: Size, *, eval_crop: float = 0.875
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Computes the two steps of `resize_center_crop` for an image of (width, height) `image_size`.

    Returns:
        (width, height) to resize to, and the box (left, top, right, bottom) to crop from the result, in pixels.
    """
    (image_width, image_height), (height, width) = image_size, size
    cover_height, cover_width = round(height / eval_crop), round(width / eval_crop)
    if image_width * cover_height <= image_height * cover_width:
        resized = cover_width, cover_width * image_height // image_width
    else:
        resized = cover_height * image_width // image_height, cover_height
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return resized, (left, top, left + width, top + height)


def normalize(images: np.ndarray | jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Converts uint8 [..., H, W, 3] to float32, (x / 255 - mean) / std per channel; meant for use inside jit."""
    per_channel = (1,) * (images.ndim - 1) + (3,)
    mean_, std_ = (jnp.asarray(values, jnp.float32).reshape(per_channel) for values in (mean, std))
    return (jnp.asarray(images).astype(jnp.float32) / 255.0 - mean_) / std_


def preprocess(
    image: str | Path | Image.Image,
    img_size: int | Sequence[int] = 224,
    *,
    eval_crop: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> jax.Array:
    """Prepares one image as evaluation does: resize, central crop, normalise.

    Args:
        image: a file, or a PIL image of any mode.
        img_size: side, or (height, width), of the model's input in pixels.
        eval_crop: the share of the resized image's side that the central crop keeps.
        mean: mean of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, likewise.

    Returns:
        float32 [H, W, 3], normalised.

    Raises:
        InputError: there is no such file, or it is not a complete image.
    """
    rgb = read_image(image) if isinstance(image, (str, Path)) else image.convert("RGB")
    return normalize(np.asarray(resize_center_crop(rgb, as_size(img_size), eval_crop=eval_crop)), mean, std)


def as_size(img_size: int | Sequence[int]) -> Size:
    """Returns (height, width) for a side, (side,) or (height, width); raises InputError for anything else."""
    sides = (img_size,) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) not in (1, 2) or not all(side > 0 for side in sides):
        raise InputError(f"img_size={img_size!r} must be a positive side or (height, width).")
    return (sides[0], sides[-1])
