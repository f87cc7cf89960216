"""Turns encoded images into the model's pixels, by functions on PIL images that draw from a given generator.

A `size` is (height, width) of the model's input in pixels. Images are resized by PIL's bicubic with antialias, as in
the official recipes.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError

from top_jax.config import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS
from top_jax.errors import InputError
from top_jax.values import LARGEST_SIDE, flag, height_width, numbers, one_of, path, refused, share

logger = logging.getLogger(__name__)

Size = tuple[int, int]

CROP_TRIES = 10
ASPECT_RATIOS = (3 / 4, 4 / 3)
MOST_AROUND = 64  # an image of more than this many times the crop's pixels is not resized as a whole
DECODE_ERRORS = (OSError,)  # a record that is missing or damaged; `decode` raises nothing else for damage

# Pillow reads 40 more formats, and for some of them starts other programs, such as Ghostscript for EPS.
FORMATS: Final = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
} | ({"AVIF": (".avif",)} if importlib.util.find_spec("PIL.AvifImagePlugin") else {})
EXTENSIONS: Final = tuple(ending for endings in FORMATS.values() for ending in endings)  # in lower or upper case
BACKGROUND: Final = (255, 255, 255, 255)  # behind transparent pixels: white, as on a web page
IGNORED: Final = "ignored_exif_orientation"  # key in the `info` of a decoded image that is shown as stored
_ORIENTATION: Final = 0x0112  # EXIF
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC, _BITS = 262, 258  # TIFF


def decode(image: bytes | np.ndarray, *, exif_rotate: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a file's bytes, or wraps uint8 [H, W, 3], as an RGB image; an animation gives its first picture.

    Args:
        image: a file in one of `FORMATS`, or pixels.
        exif_rotate: rotate the image by its EXIF orientation; otherwise it stays as stored, as in torchvision (but
            Pillow itself rotates a TIFF).
        max_pixels: largest number of pixels; a larger image is not decoded.

    Raises:
        OSError: the bytes are not a complete image, are too large, or have pixels without a defined range (`to_rgb`).
        InputError: an array of another dtype or shape.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"pixels are {image.dtype} {list(image.shape)}; they must be uint8 [H, W, 3].")
        return Image.fromarray(image)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow refuses more than twice its own limit
    try:
        with Image.open(io.BytesIO(image), formats=tuple(FORMATS)) as encoded:
            width, height = encoded.size
            if width * height > max_pixels:
                raise OSError(f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")
            return to_rgb(encoded, exif_rotate=exif_rotate)
    except UnidentifiedImageError:  # its message names the BytesIO; callers name the file
        raise OSError(f"no {', '.join(FORMATS)} image") from None
    except Exception as error:  # decoders raise nearly anything for damage, such as RuntimeError and AttributeError
        name = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise OSError(name + " ".join(str(error).split())) from error


def header_size(image: bytes) -> Size:
    """Returns (height, width) of an image file as stored. Raises OSError if its header is damaged."""
    try:
        with Image.open(io.BytesIO(image), formats=tuple(FORMATS)) as encoded:
            return encoded.height, encoded.width
    except Exception as error:  # as in `decode`
        raise OSError(str(error)) from error


def to_rgb(image: Image.Image, *, exif_rotate: bool = False) -> Image.Image:
    """Converts an image of any mode with a defined range to 8-bit RGB.

    16-bit grey keeps its upper 8 bits, as Pillow does for 16-bit colours. Transparent images are composed over white.
    An orientation that is ignored is kept in the result's `info[IGNORED]`.

    Args:
        image: a PIL image.
        exif_rotate: rotate it by its EXIF orientation.

    Raises:
        OSError: 32-bit integers or floats, which have no defined range; or the image has no pixels.
    """
    if not min(image.size):
        raise OSError("it has no pixels")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise OSError(f"its pixels are {kind}, which have no defined range; save it with 8 or 16 bits")
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I;16"):
        image = _upper_bits(image)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba)
    rgb = image.convert("RGB")
    if exif_rotate and orientation in _TURNS:
        return rgb.transpose(_TURNS[orientation])
    if orientation in _TURNS:
        rgb.info[IGNORED] = orientation
    return rgb


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (as stored) where there is none or the EXIF part is damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels are intact
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upper_bits(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey (TIFF also has 12 bits in 16) as 8-bit grey, with alpha where one value is transparent."""
    values, tags = np.asarray(image).astype(np.uint16), getattr(image, "tag_v2", {})
    bits = 12 if tags.get(_BITS) == (12,) else 16
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only 8 bits
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])


def read_image(file: str | Path, *, exif_rotate: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads and decodes an image file, as `decode`; warns once if it ignores an EXIF orientation.

    Raises:
        InputError: there is no such file, or it is not a complete image.
    """
    if not Path(file).is_file():  # also not a pipe, which would never end
        problem = "is not a file" if Path(file).exists() else "does not exist"
        raise InputError(f"image file {file} {problem}; pass the path of an image file.")
    try:
        image = decode(Path(file).read_bytes(), exif_rotate=exif_rotate, max_pixels=max_pixels)
    except DECODE_ERRORS as error:
        raise InputError(f"cannot read {file} as an image: {error}.") from error
    _note_ignored(image, str(file))
    return image


_noted: set[str] = set()
NOT_FOLLOWED: Final = (
    "%s has the EXIF orientation %d, which is not followed, as in torchvision; %s turns such images (said once)"
)


def _note_ignored(image: Image.Image, name: str) -> None:
    """Warns, once per process, that an image is used as stored although its EXIF orientation asks to rotate it."""
    if (orientation := image.info.get(IGNORED)) and not _noted:
        _noted.add(name)
        logger.warning(NOT_FOLLOWED, name, orientation, "exif_rotate=True")


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
    if resized[0] * resized[1] <= MOST_AROUND * size[0] * size[1]:
        return image.resize(resized, Image.Resampling.BICUBIC).crop(box)
    # The same pixels up to rounding, without the rest of a very long image, which could take gigabytes.
    across, down = image.width / resized[0], image.height / resized[1]
    left, right = (min(max(side * across, 0.0), float(image.width)) for side in box[::2])
    top, bottom = (min(max(side * down, 0.0), float(image.height)) for side in box[1::2])
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


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
    image: str | Path | bytes | np.ndarray | Image.Image,
    img_size: int | Sequence[int] = 224,
    *,
    eval_crop: float = 0.875,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    exif_rotate: bool = False,
) -> jax.Array:
    """Prepares one image as evaluation does: resize, central crop, normalise.

    Args:
        image: a path, the bytes of an image file, a PIL image of any mode, or pixels, uint8 [H, W, 3].
        img_size: side, or (height, width), of the model's input in pixels.
        eval_crop: the share of the resized image's side that the central crop keeps.
        interpolation: `bicubic`, with antialias: the one that every recipe uses.
        mean: mean of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, likewise.
        exif_rotate: rotate the image by its EXIF orientation. By default it stays as stored, as in torchvision and
            timm, with one warning.

    Returns:
        float32 [H, W, 3], normalised. 16-bit grey is scaled, and transparent images are composed over white (`to_rgb`).

    Raises:
        InputError: there is no such file, it is not a complete image, its pixels have no defined range, or another
            argument is of another type or out of range.
    """
    size, eval_crop, exif_rotate = as_size(img_size), share("eval_crop", eval_crop), flag("exif_rotate", exif_rotate)
    one_of("interpolation", interpolation, ("bicubic",))
    mean, std = numbers("mean", mean, 3), numbers("std", std, 3)
    if min(std) <= 0:
        raise refused("std", std, "three numbers above 0")
    if max(size) / eval_crop > LARGEST_SIDE:
        raise refused("eval_crop", eval_crop, f"a share that leaves img_size / eval_crop at most {LARGEST_SIDE} pixels")
    if isinstance(image, str | os.PathLike):
        rgb = read_image(path("image", image), exif_rotate=exif_rotate)
    else:
        if not isinstance(image, bytes | np.ndarray | Image.Image):
            raise refused("image", image, "a path, a file's bytes, a PIL image, or a NumPy array uint8[H, W, 3]")
        try:
            if isinstance(image, Image.Image):
                rgb = to_rgb(image, exif_rotate=exif_rotate)
            else:
                rgb = decode(image, exif_rotate=exif_rotate)
        except (OSError, ValueError) as error:  # ValueError: a PIL image whose file is closed
            if isinstance(error, InputError):
                raise
            kind = f"image of mode {image.mode}" if isinstance(image, Image.Image) else "image"
            raise InputError(f"cannot use this {kind}: {error}.") from error
        _note_ignored(rgb, "the image")
    return normalize(np.asarray(resize_center_crop(rgb, size, eval_crop=eval_crop)), mean, std)


def as_size(img_size: int | Sequence[int]) -> Size:
    """Returns (height, width) for a side, (side,) or (height, width); raises InputError for anything else."""
    return height_width("img_size", img_size)
