"""The default source: scikit-learn's 1,797 handwritten digits, which need no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from top_jax.data.sources.base import Record
from top_jax.errors import InputError
from top_jax.optional import optional_package

# Constant, not the run's seed: runs with different seeds must be evaluated on the same test images.
SPLIT_SEED = 0
TEST_SHARE = 0.2
SPLITS = ("train", "test")


class DigitsSource:
    """Real 8x8 digits (UCI ML), grey repeated to RGB, in a stratified split of 1,437 training and 360 test images.

    Attributes:
        labels: int [N], the label of every image.
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, split: str):
        """Reads the bundled file.

        Raises:
            InputError: `split` is neither "train" nor "test".
        """
        self._images, self.labels = load_split(split, purpose="data.source=digits")
        self.name = f"digits/{split}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        """Returns a name for record `index`."""
        return f"{self.name} record {index}"


def load_split(split: str, *, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [N, 8, 8, 3] and labels int [N]; raises InputError for an unknown split."""
    if split not in SPLITS:
        raise InputError(f"the digits have no split {split!r}; use one of {', '.join(SPLITS)}.")
    datasets, model_selection = (
        optional_package(f"sklearn.{name}", purpose=purpose) for name in ("datasets", "model_selection")
    )
    digits: Any = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the file holds 0..16
    train, test = model_selection.train_test_split(
        np.arange(len(grey)), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=digits.target
    )
    chosen = train if split == "train" else test
    return np.repeat(grey[chosen, :, :, None], 3, axis=-1), digits.target[chosen]
