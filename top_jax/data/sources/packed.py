"""Datasets packed into one .npz file, for machines that can neither download nor prepare them.

`pack` (top-jax pack) writes the file from any other source. Its arrays:

    name         name of the dataset
    classes      [C] names of the classes
    SPLIT/images uint8, the encoded images one after another
    SPLIT/ends   int64 [N], the offset at which each image ends
    SPLIT/labels int32 [N]

Where pixels are labelled, these replace SPLIT/labels:

    SPLIT/maps     uint8, the label maps one after another, as PNG
    SPLIT/map_ends int64 [N]
    ignore_label, reduce_zero_label   what their values mean, as in config.data
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from top_jax.config import DataConfig
from top_jax.data import segmentation_transforms as dense
from top_jax.data.sources.base import DenseSource, Record, Source, check_label, is_dense
from top_jax.errors import InputError
from top_jax.files import check_writable, save_arrays

MEANING: Final = ("ignore_label", "reduce_zero_label")
DEFAULT: Final = DataConfig()
AGAIN: Final = "write it again with top-jax pack"


class PackedSource:
    """One split of a packed file of labelled images, held in memory."""

    def __init__(self, path: str | Path, split: str):
        """Reads the split.

        Raises:
            InputError: the file or the split does not exist, or the file is damaged or not a packed dataset.
        """
        name, self.class_names, [images, ends, self.labels] = _read(path, split, ("images", "ends", "labels"))
        self.name, self.num_classes = f"{name}/{split}", len(self.class_names)
        self._images = _Files(path, images, ends)
        if (self.labels.ndim, self.labels.dtype.kind) != (1, "i") or len(self.labels) != len(self._images):
            raise _contradiction(path)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        """Returns a name for record `index`."""
        return f"{self.name} record {index}"


class PackedDenseSource:
    """One split of a packed file of images with label maps, held in memory."""

    def __init__(self, path: str | Path, split: str):
        """Reads the split; raises InputError as `PackedSource`."""
        parts = ("images", "ends", "maps", "map_ends")
        name, self.class_names, [images, ends, maps, map_ends] = _read(path, split, parts)
        self.name, self.num_classes = f"{name}/{split}", len(self.class_names)
        self._images, self._maps = _Files(path, images, ends), _Files(path, maps, map_ends)
        if len(self._images) != len(self._maps):
            raise _contradiction(path)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], self._maps[index])

    def describe(self, index: int) -> str:
        """Returns a name for record `index`."""
        return f"{self.name} record {index}"

    def describe_labels(self, index: int) -> str:
        """Returns a name for the label map of record `index`."""
        return f"the label map of {self.describe(index)}"

    def label_size(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of label map `index`; raises OSError or LabelError if it is unusable."""
        return dense.png_size(self._maps[index])


def open_packed(path: str | Path, split: str, config: DataConfig) -> Source:
    """Opens a split of a packed file, of labelled images or of labelled pixels.

    Raises:
        InputError: as the sources; or the file was packed with another `ignore_label` or `reduce_zero_label`.
    """
    meaning = _read_meaning(path, split)
    if meaning is None:
        return PackedSource(path, split)
    for setting, packed in meaning.items():
        if packed != (given := getattr(config, setting)):
            raise InputError(
                f"{path} was packed with config.data.{setting}={packed!r}, but it is {given!r} here; set that value."
            )
    return PackedDenseSource(path, split)


class _Files:
    """Encoded files, one after another in an array; `ends` are the offsets at which each ends."""

    def __init__(self, path: str | Path, content: np.ndarray, ends: np.ndarray):
        fits = (
            (content.ndim, content.dtype) == (1, np.uint8)
            and (ends.ndim, ends.dtype.kind) == (1, "i")
            and (np.diff(ends, prepend=0) >= 0).all()
            and (ends[-1] if len(ends) else 0) == len(content)
        )
        if not fits:
            raise _contradiction(path)
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._content[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()


def _contradiction(path: str | Path) -> InputError:
    return InputError(f"the sizes in {path} contradict each other; {AGAIN}.")


def _load(path: str | Path, split: str, read: Callable[[Any], Any]) -> Any:
    """Opens a packed file and returns the result of `read`.

    Raises:
        InputError: there is no such file or split, or `read` fails.
    """
    if not Path(path).is_file():
        raise InputError(f"no packed dataset {path}; write one with top-jax pack.")
    try:
        with open(path, "rb") as stream, np.load(stream) as file:  # NumPy leaves a damaged file open
            splits = sorted(key.removesuffix("/images") for key in file if key.endswith("/images"))
            if split not in splits:
                raise InputError(f"{path} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
            return read(file)
    except InputError:
        raise
    except Exception as error:  # a damaged zip may raise nearly any exception, such as zlib.error and MemoryError
        raise InputError(
            f"{path} is not a packed dataset, or is damaged ({type(error).__name__}: {error}); {AGAIN}."
        ) from error


def _read(path: str | Path, split: str, parts: tuple[str, ...]) -> tuple[str, tuple[str, ...], list[np.ndarray]]:
    """Returns the dataset's name, the names of its classes, and the arrays of a split."""
    name, classes, arrays = _load(
        path, split, lambda file: (file["name"], file["classes"], [file[f"{split}/{part}"] for part in parts])
    )
    if (classes.ndim, classes.dtype.kind) != (1, "U"):
        raise _contradiction(path)
    return str(name), tuple(map(str, classes.tolist())), arrays


def _read_meaning(path: str | Path, split: str) -> dict[str, Any] | None:
    """Returns the values of `MEANING` with which label maps were packed; None for labelled images."""

    def read(file: Any) -> dict[str, Any] | None:
        return {name: file[name].item() for name in MEANING} if f"{split}/maps" in file else None

    return _load(path, split, read)


def pack(
    path: str | Path,
    name: str,
    splits: Mapping[str, Source],
    *,
    config: DataConfig = DEFAULT,
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes splits of other sources into one file, whole or not at all.

    Args:
        path: a new file whose name ends in .npz.
        name: name of the dataset.
        splits: sources by split name. Encoded images and label maps are copied; pixels become PNG, which is lossless.
        config: what the values of label maps mean.
        on_images: called with the number of images read since the last call, for a progress bar.

    Raises:
        InputError: the file exists or cannot be written, or a record cannot be read.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose another name, or delete it.")
    try:
        check_writable(path)  # before any work that would be lost
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error
    arrays: dict[str, Any] = {"name": np.array(name)}
    for split, source in splits.items():
        arrays["classes"] = np.array(source.class_names)
        arrays |= {f"{split}/{part}": array for part, array in _arrays(source, on_images).items()}
        if is_dense(source):
            arrays |= {setting: np.array(getattr(config, setting)) for setting in MEANING}
    save_arrays(path, arrays)


def _arrays(source: Source, on_images: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Returns the arrays of a split by the names in the module's description."""
    images, maps, labels = [], [], []
    for index in range(len(source)):
        try:
            image, label = source[index]
            if is_dense(source):
                maps.append(_map(source, index, label))
        except OSError as error:
            raise InputError(
                f"cannot read {source.describe(index)} ({error}); replace or remove it, and pack again."
            ) from error
        if not is_dense(source):
            labels.append(check_label(source, index, label))
        images.append(image if isinstance(image, bytes) else _png(image))
        on_images(1)
    arrays = _joined("images", "ends", images)
    return arrays | (_joined("maps", "map_ends", maps) if is_dense(source) else {"labels": np.array(labels, np.int32)})


def _joined(content: str, ends: str, files: list[bytes]) -> dict[str, np.ndarray]:
    return {
        content: np.frombuffer(b"".join(files), np.uint8),
        ends: np.cumsum([len(file) for file in files], dtype=np.int64),
    }


def _map(source: DenseSource, index: int, label: int | bytes | np.ndarray) -> bytes:
    """Returns a label map as PNG; raises InputError if it is of another kind."""
    try:
        if isinstance(label, bytes):
            dense.png_size(label)
            return label
        return _png(dense.decode_labels(np.asarray(label)))
    except dense.LabelError as error:
        raise InputError(f"{source.describe_labels(index)} {error}; correct it, and pack again.") from error


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
