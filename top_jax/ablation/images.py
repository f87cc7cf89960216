"""The evaluation images: decoded once for all settings, where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import jax
import numpy as np

from top_jax.config import DataConfig
from top_jax.data import PADDING_INDEX, Source, eval_batches, prefetch_to_device
from top_jax.data.sources import Record
from top_jax.errors import InputError
from top_jax.sharding import by_image, check_divisible, make_mesh

HELD_BYTES: Final = 2_000_000_000  # of pixels, uint8, kept on the devices; beyond, each setting reads them anew

DeviceBatch = dict[str, jax.Array]


class Images:
    """Batches of a split, as often as they are iterated over.

    Args:
        source: the evaluation split.
        data: how it is cropped and read.
        img_size: (height, width) of the model's input.
        batch_size: over all devices.
        limit: only the first so many images; None takes all.

    Attributes:
        count: images, unreadable ones included.
        held: whether they are read once.

    Raises:
        InputError: a limit that is not there, or a batch size that does not split over the devices.
    """

    def __init__(
        self, source: Source, data: DataConfig, *, img_size: tuple[int, int], batch_size: int, limit: int | None
    ):
        if limit is not None and not 1 <= limit <= len(source):
            raise InputError(f"limit_images={limit}; needed: 1 .. {len(source)}, what {source.name} has.")
        self.count = limit or len(source)
        batch_size = min(batch_size, self.count) if len(jax.devices()) == 1 else batch_size
        check_divisible("batch_size", batch_size)
        self._source = _First(source, self.count)
        self._data, self._img_size, self._batch_size = data, img_size, batch_size
        self.held = self.count * img_size[0] * img_size[1] * 3 <= HELD_BYTES
        self._batches: list[DeviceBatch] | None = None

    def __iter__(self) -> Iterator[DeviceBatch]:
        if not self.held:
            return self._read()
        if self._batches is None:
            self._batches = list(self._read())
        return iter(self._batches)

    def _read(self) -> Iterator[DeviceBatch]:
        with eval_batches(self._source, self._data, img_size=self._img_size, batch_size=self._batch_size) as batches:
            for batch, _ in prefetch_to_device(batches, by_image(make_mesh()), self._data.prefetch):
                yield batch


class _First:
    """The first images of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Record:
        return self._source[index]

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def counted(batch: DeviceBatch) -> np.ndarray:
    """bool [B]: rows that count."""
    return np.asarray(batch["mask"]) > 0


def left_out(batch: DeviceBatch) -> list[int]:
    """Indices of images that cannot be read."""
    index = np.asarray(batch["index"])
    return index[~counted(batch) & (index != PADDING_INDEX)].tolist()
