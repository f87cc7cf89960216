"""A whole dataset in one .npz file, for a machine to which only a small file can be copied.

`pack` (top-jax pack) writes the file from any other source. Its arrays:

    name         name of the dataset
    classes      [C] names of the classes
    SPLIT/images uint8, the encoded images one after another
    SPLIT/ends   int64 [N], the offset at which each image ends
    SPLIT/labels int32 [N]
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from top_jax.data.sources.base import Record, Source, check_label
from top_jax.errors import InputError
from top_jax.files import check_writable, requested_file

PARTS = ("images", "ends", "labels")


class PackedSource:
    """One split of a packed file, held in memory."""

    def __init__(self, path: str | Path, split: str):
        """Reads the split.

        Raises:
            InputError: the file or the split does not exist, or the file is damaged or not a packed dataset.
        """
        if not Path(path).is_file():
            raise InputError(f"no packed dataset {path}; write one with top-jax pack.")
        try:
            with open(path, "rb") as stream, np.load(stream) as file:  # NumPy leaves a damaged file open
                splits = sorted(key.removesuffix("/images") for key in file if key.endswith("/images"))
                if split not in splits:
                    raise InputError(f"{path} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
                name, classes = file["name"], file["classes"]
                self._images, self._ends, self.labels = (file[f"{split}/{part}"] for part in PARTS)
        except InputError:
            raise
        except Exception as error:  # damage inside a zip raises nearly anything, such as zlib.error and MemoryError
            raise InputError(
                f"{path} is no packed dataset, or is damaged ({type(error).__name__}: {error}); write it again with "
                "top-jax pack."
            ) from error
        self.name = f"{name}/{split}"
        self.class_names: tuple[str, ...] = tuple(map(str, classes.ravel().tolist()))
        self.num_classes = len(self.class_names)
        fits = (
            (classes.ndim, classes.dtype.kind) == (1, "U")
            and (self._images.ndim, self._images.dtype) == (1, np.uint8)
            and all(part.ndim == 1 and part.dtype.kind == "i" for part in (self._ends, self.labels))
            and len(self._ends) == len(self.labels)
            and (np.diff(self._ends, prepend=0) >= 0).all()
            and (self._ends[-1] if len(self._ends) else 0) == len(self._images)
        )
        if not fits:
            raise InputError(f"the sizes in {path} contradict each other; write it again with top-jax pack.")

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
        InputError: the file exists or cannot be written, or a record cannot be read.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose another name, or delete it.")
    try:
        check_writable(path)  # before the work that would be lost
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place.") from error
    arrays: dict[str, Any] = {"name": np.array(name)}
    for split, source in splits.items():
        images, labels = [], np.empty(len(source), np.int32)
        for index in range(len(source)):
            try:
                image, label = source[index]
            except OSError as error:
                raise InputError(
                    f"cannot read {source.describe(index)} ({error}); replace or remove it, and pack again."
                ) from error
            labels[index] = check_label(source, index, label)
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
