"""The default source of label maps: scikit-learn's digits on crops of its two photographs, which need no download."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

from top_jax.data.sources.base import Record
from top_jax.data.sources.digits import load_split
from top_jax.optional import optional_package

SIDE: Final = 64  # side of a scene, in pixels
PHOTOGRAPHS: Final = ("china.jpg", "flower.jpg")
TRAIN_WIDTH: Final = 0.75  # training scenes use the left part of the photographs, test scenes the rest
BACKGROUND_SIDES: Final = (64, 160)  # side of a scene's background, in pixels of the photograph
BRIGHTNESS: Final = 0.6  # factor for the photographs, so that digits are lighter than their background
DIGITS: Final = (1, 2)  # per scene; one if there is no room for two
PLACE_TRIES: Final = 10
DIGIT_SIDES: Final = (32, 48)  # in pixels of the scene
STROKE, EMPTY = 0.45, 0.15  # ink from which a pixel is digit; ink up to which it is background
LEAST_COLOUR: Final = 180  # in each channel of a digit
SEED: Final = 0  # constant, not the run's: every run sees the same scenes


class DigitScenesSource:
    """Photographs with handwritten digits on them: real pixels, labels by construction.

    Scene i of a split shows digit i of that split of `DigitsSource`, and often another one of the same split. The
    digits have random sizes, positions and light colours. A pixel of a stroke has the digit's class; one at its edge,
    where the colours mix, is ignored.
    """

    num_classes = 11
    class_names = ("background", *"0123456789")

    def __init__(self, split: str):
        """Reads the bundled files.

        Raises:
            InputError: `split` is neither "train" nor "test".
        """
        digits, self._of_digits = load_split(split, purpose="data.source=digit_scenes")
        self._ink = digits[..., 0]
        self.name = f"digit_scenes/{split}"
        self._split = split
        self._photographs = [_part(name, split) for name in PHOTOGRAPHS]
        self._drawn: dict[int, Record] = {}  # 16 KB each; drawing a scene takes as long as augmenting it

    def __len__(self) -> int:
        return len(self._ink)

    def __getitem__(self, index: int) -> Record:
        if index not in self._drawn:
            self._drawn[index] = self._scene(index)
        return self._drawn[index]

    def _scene(self, index: int) -> Record:
        rng = np.random.default_rng((SEED, self._split == "train", index))
        scene = self._background(rng)
        labels = np.zeros((SIDE, SIDE), np.uint8)
        others = rng.integers(len(self._ink), size=int(rng.integers(DIGITS[0] - 1, DIGITS[1])))
        taken = np.zeros((SIDE, SIDE), bool)
        for digit in (index, *others):
            self._draw(int(digit), scene, labels, taken, rng)
        return Record(np.rint(scene).astype(np.uint8), labels)

    def describe(self, index: int) -> str:
        """Returns a name for record `index`."""
        return f"{self.name} record {index}"

    def describe_labels(self, index: int) -> str:
        """Returns a name for the label map of record `index`."""
        return f"the label map of {self.describe(index)}"

    def label_size(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of every scene."""
        del index
        return SIDE, SIDE

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photograph = self._photographs[rng.integers(len(self._photographs))]
        side = int(rng.integers(BACKGROUND_SIDES[0], BACKGROUND_SIDES[1] + 1))
        top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
        part = Image.fromarray(photograph[top : top + side, left : left + side])
        return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) * BRIGHTNESS

    def _draw(
        self, digit: int, scene: np.ndarray, labels: np.ndarray, taken: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Draws a digit into a scene, in place; leaves it out if `PLACE_TRIES` tries find no free position.

        Args:
            digit: its index.
            scene: float32 [SIDE, SIDE, 3].
            labels: uint8 [SIDE, SIDE].
            taken: bool [SIDE, SIDE], true where another digit is.
            rng: the random generator.
        """
        side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
        for _ in range(PLACE_TRIES):
            top, left = (int(place) for place in rng.integers(SIDE - side + 1, size=2))
            place = slice(top, top + side), slice(left, left + side)
            if not taken[place].any():
                break
        else:
            return
        taken[place] = True
        ink = Image.fromarray(self._ink[digit]).resize((side, side), Image.Resampling.BICUBIC)
        cover = np.clip((np.asarray(ink, np.float32) / 255 - EMPTY) / (STROKE - EMPTY), 0, 1)
        colour = rng.integers(LEAST_COLOUR, 256, size=3)
        scene[place] += cover[..., None] * (colour.astype(np.float32) - scene[place])
        labels[place] = np.where(cover < 1, np.where(cover > 0, 255, 0), self._of_digits[digit] + 1)


def _part(name: str, split: str) -> np.ndarray:
    """Returns the part of a bundled photograph that belongs to a split, uint8 [H, W, 3]."""
    datasets = optional_package("sklearn.datasets", purpose="data.source=digit_scenes")
    photograph = datasets.load_sample_image(name)
    border = round(TRAIN_WIDTH * photograph.shape[1])
    return np.ascontiguousarray(photograph[:, :border] if split == "train" else photograph[:, border:])
