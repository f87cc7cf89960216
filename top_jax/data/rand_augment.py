"""RandAugment in timm's notation, as the DeiT, ViM and PlainMamba recipes use it (timm 0.4.12, data/auto_augment.py).

An image goes through `num_layers` operations drawn with replacement; each is applied with `probability`. A magnitude
in 0..10 sets the strength of an operation. Geometric operations, and the enhancements of the increasing set, also have
a random sign. Images are PIL's RGB, resampled bicubically; the given generator is the only source of randomness.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from top_jax.errors import InputError

Number = int | float
Fill = tuple[int, int, int]
"""The RGB colour of pixels from outside the image."""

MAX_MAGNITUDE = 10.0
UNIFORM_STD = 100.0  # timm treats a larger mstd as infinite: magnitudes uniform in 0..m
DEFAULT_FILL: Fill = (128, 128, 128)
KEYS = {
    "m": "magnitude, 0..10",
    "mstd": "standard deviation of the magnitude, at least 0 (above 100, or inf: uniform in 0..m)",
    "n": "number of operations per image, at least 1",
    "p": "probability of each operation, 0..1",
    "inc": "choice of operations (1: all grow stronger with the magnitude, 0: the plain set)",
}
_NUMBER = r"\d+(?:\.\d+)?"
_FORMS = {"m": _NUMBER, "mstd": f"inf|{_NUMBER}", "n": r"\d+", "p": _NUMBER, "inc": "[01]"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A RandAugment policy: `parse` builds one from timm's notation, and a call augments an image."""

    magnitude: Number = MAX_MAGNITUDE
    magnitude_std: Number = 0.0  # normal distribution, clipped to 0..10; math.inf: uniform in 0..magnitude
    increasing: bool = False
    num_layers: int = 2
    probability: Number = 0.5

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        _check("m", self.magnitude, 0 <= self.magnitude <= MAX_MAGNITUDE)
        _check("mstd", self.magnitude_std, self.magnitude_std >= 0)
        _check("n", self.num_layers, self.num_layers >= 1)
        _check("p", self.probability, 0 <= self.probability <= 1)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The fifteen operations, each drawn with equal probability."""
        return INCREASING if self.increasing else PLAIN

    def __call__(self, image: Image.Image, rng: np.random.Generator, fill: Fill = DEFAULT_FILL) -> Image.Image:
        """Returns the augmented image, RGB and of the same size."""
        for place in rng.integers(len(self.operations), size=self.num_layers):
            if rng.random() < self.probability:
                operation = self.operations[place]
                argument = operation.argument(self._draw_magnitude(rng), negative=rng.random() < 0.5)
                image = operation.apply(image, argument, fill)
        return image

    def _draw_magnitude(self, rng: np.random.Generator) -> Number:
        if self.magnitude_std == math.inf:
            return rng.uniform(0, self.magnitude)
        return min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), MAX_MAGNITUDE)


def parse(notation: str) -> RandAugment:
    """Parses timm's notation, such as "rand-m9-mstd0.5-inc1": "rand", then the key and value of each setting.

    `KEYS` lists the keys. timm's `w` (weighted choice) and `mmax` (magnitudes above 10) are not supported.

    Raises:
        InputError: the text does not have this form, a key is unknown, or a value is out of range.
    """
    name, *parts = notation.split("-")
    if name != "rand":
        raise InputError(f"config.augment.rand_augment={notation!r} must start with 'rand', as rand-m9-mstd0.5-inc1.")
    given = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+?)(inf|\d.*)", part)
        if not match or not re.fullmatch(_FORMS.get(match[1], "(?!)"), match[2]):
            known = "; ".join(f"{key} ({meaning})" for key, meaning in KEYS.items())
            raise InputError(f"config.augment.rand_augment={notation!r} has {part!r}; known settings: {known}.")
        given[match[1]] = float(match[2])
    std = given.get("mstd", 0.0)
    return RandAugment(
        magnitude=given.get("m", MAX_MAGNITUDE),
        magnitude_std=math.inf if std > UNIFORM_STD else std,
        increasing=given.get("inc") == 1,
        num_layers=int(given.get("n", 2)),
        probability=given.get("p", 0.5),
    )


def _check(key: str, value: Number, holds: bool) -> None:
    if not holds:
        raise InputError(f"config.augment.rand_augment has {key}{value:g}; {key} is the {KEYS[key]}.")


def fill_of(mean: Sequence[float]) -> Fill:
    """Returns the colour of `mean`, for pixels scaled to 0..1, rounded as timm's `transforms_imagenet_train` does."""
    red, green, blue = (min(255, round(255 * channel)) for channel in mean)
    return red, green, blue


class Operation(NamedTuple):
    """One operation, and how a magnitude becomes its argument."""

    name: str  # as in timm
    apply: Callable[[Image.Image, Number, Fill], Image.Image]
    of_share: Callable[[Number], Number] = float  # the argument of `apply`, from magnitude / 10 with its sign
    signed: bool = False

    def argument(self, magnitude: Number, *, negative: bool) -> Number:
        """Returns the argument of `apply` for a magnitude in 0..10; `negative` matters only for a signed operation."""
        share = magnitude / MAX_MAGNITUDE
        return self.of_share(-share if negative and self.signed else share)


def _auto_contrast(image: Image.Image, argument: Number, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, argument: Number, fill: Fill) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, argument: Number, fill: Fill) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, degrees: Number, fill: Fill) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, bits: Number, fill: Fill) -> Image.Image:
    """Keeps the highest `bits` of each channel; 0 bits, which ImageOps.posterize refuses, give black."""
    mask = 256 - 2 ** (8 - int(bits))
    return image.point([value & mask for value in range(256)] * 3)


def _solarize(image: Image.Image, threshold: Number, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, int(threshold))


def _solarize_add(image: Image.Image, addition: Number, fill: Fill) -> Image.Image:
    """Adds to the values below 128."""
    return image.point([min(255, value + int(addition)) if value < 128 else value for value in range(256)] * 3)


def _color(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _contrast(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _brightness(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _sharpness(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def _shear_x(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return _affine(image, (1, factor, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, factor: Number, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, factor, 1, 0), fill)


def _translate_x(image: Image.Image, share: Number, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, share * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, share: Number, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, share * image.height), fill)


def _affine(image: Image.Image, to_source: tuple[Number, ...], fill: Fill) -> Image.Image:
    """Moves pixels: (x, y) of the result is (a x + b y + c, d x + e y + f) of the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, to_source, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


# timm's sets `_RAND_INCREASING_TRANSFORMS` and `_RAND_TRANSFORMS`, in its order. Both translate by a share of the
# image, so timm's `translate_const` (45 % of the smaller side) is not used. In the plain set, Posterize and Solarize
# grow weaker with the magnitude, and the enhancements go from weakening to strengthening.
_FIRST = (Operation("AutoContrast", _auto_contrast), Operation("Equalize", _equalize), Operation("Invert", _invert))
_ROTATE = Operation("Rotate", _rotate, lambda share: share * 30, signed=True)
_SOLARIZE_ADD = Operation("SolarizeAdd", _solarize_add, lambda share: int(share * 110))
_MOVES = (
    Operation("ShearX", _shear_x, lambda share: share * 0.3, signed=True),
    Operation("ShearY", _shear_y, lambda share: share * 0.3, signed=True),
    Operation("TranslateXRel", _translate_x, lambda share: share * 0.45, signed=True),
    Operation("TranslateYRel", _translate_y, lambda share: share * 0.45, signed=True),
)
_ENHANCEMENTS = (("Color", _color), ("Contrast", _contrast), ("Brightness", _brightness), ("Sharpness", _sharpness))
INCREASING = (
    *_FIRST,
    _ROTATE,
    Operation("PosterizeIncreasing", _posterize, lambda share: 4 - int(share * 4)),
    Operation("SolarizeIncreasing", _solarize, lambda share: 256 - int(share * 256)),
    _SOLARIZE_ADD,
    *(
        Operation(f"{name}Increasing", to, lambda share: max(0.1, 1 + share * 0.9), signed=True)
        for name, to in _ENHANCEMENTS
    ),
    *_MOVES,
)
PLAIN = (
    *_FIRST,
    _ROTATE,
    Operation("Posterize", _posterize, lambda share: int(share * 4)),
    Operation("Solarize", _solarize, lambda share: int(share * 256)),
    _SOLARIZE_ADD,
    *(Operation(name, to, lambda share: share * 1.8 + 0.1) for name, to in _ENHANCEMENTS),
    *_MOVES,
)
