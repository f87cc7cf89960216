"""A whole dataset in one .npz file, for a machine to which only a small file can be copied.

`pack` (python -m top_jax.cli.pack) writes the file from any other source. Its arrays:

    name         name of the dataset
    classes      [C] names of the classes
    SPLIT/images uint8, the encoded images one after another
    SPLIT/ends   int64 [N], the offset at which each image ends
    SPLIT/labels int32 [N]
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from top_jax.data.sources.base import Record, Source
from top_jax.errors import InputError
from top_jax.files import requested_file


class PackedSource:
    """One split of a packed file, held in memory."""

    def __init__(self, path: str | Path, split: str):
        """Reads the split.

        Raises:
            InputError: the file or the split does not exist, or the file is not a packed dataset.
        """
        try:
            with np.load(path) as file:
                splits = sorted(key.removesuffix("/images") for key in file if key.endswith("/images"))
                if split not in splits:
                    raise InputError(f"{path} has no split {split!r}; use one of {', '.join(splits)}.")
                self.name = f"{file['name']}/{split}"
                self.class_names: tuple[str, ...] = tuple(file["classes"].tolist())
                self.num_classes = len(self.class_names)
                self._images, self._ends = file[f"{split}/images"], file[f"{split}/ends"]
                self.labels = file[f"{split}/labels"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is no packed dataset ({error}); write one with python -m top_jax.cli.pack."
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        start = self._ends[index - 1] if index else 0
        return Record(self._images[start : self._ends[index]].tobytes(), int(self.labels[index]))

    def describe(self, index: int) -> str:
        """Returns a name for record `index`."""
        return f"{self.name} record {index}"


def pack(
    path: str | Path,
    name: str,
    splits: Mapping[str, Source],
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes splits of other sources into one file that `PackedSource` reads, whole or not at all.

    Args:
        path: a new file whose name ends in .npz.
        name: name of the dataset.
        splits: sources by split name. Encoded images are copied; pixels become PNG, which is lossless.
        on_images: called with the number of images read since the last call, for a progress bar.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists; choose another name, or delete it.")
    arrays: dict[str, Any] = {"name": np.array(name)}
    for split, source in splits.items():
        images, labels = [], np.empty(len(source), np.int32)
        for index in range(len(source)):
            image, labels[index] = source[index]
            images.append(image if isinstance(image, bytes) else _png(image))
            on_images(1)
        arrays["classes"] = np.array(source.class_names)
        arrays[f"{split}/images"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{split}/ends"] = np.cumsum([len(image) for image in images], dtype=np.int64)
        arrays[f"{split}/labels"] = labels
    with requested_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
