"""Images in folders, as most people store ImageNet: root/<split>/<class>/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from top_jax.data.sources.base import Record
from top_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = "An image folder is laid out as <data_dir>/<split>/<class>/*.jpg."


class ImageFolderSource:
    """One split of an image folder; the label of a class is its index in the sorted class names.

    Attributes:
        classes: the names of the class folders, sorted.
        labels: int32 [N], the label of every image.
    """

    def __init__(self, root: str | Path, split: str):
        """Lists the files without opening them.

        Raises:
            InputError: the root or split does not exist, or has no class folder, or a class has no image.
        """
        self.name = f"{root}/{split}"
        self._folder = Path(root) / split
        self.classes = class_names(root, split)
        names, labels = [], []
        for label, class_name in enumerate(self.classes):
            files = _image_files(self._folder / class_name)
            if not files:
                raise InputError(
                    f"no image in {self._folder / class_name}; it needs files ending in {', '.join(EXTENSIONS)}. "
                    "Add images or remove the folder."
                )
            names += [os.fsencode(f"{class_name}/{file}") for file in files]
            labels += [label] * len(files)
        # One array of bytes: sending a million Path or str objects to each worker process would take seconds.
        self._names = np.array(names)
        self.labels = np.array(labels, np.int32)

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders."""
        return self.classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._path(index).read_bytes(), int(self.labels[index]))

    def describe(self, index: int) -> str:
        """Returns the path of file `index`."""
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / os.fsdecode(self._names[index].item())


def class_names(root: str | Path, split: str) -> tuple[str, ...]:
    """Returns the sorted names of the class folders in root/<split>.

    Raises:
        InputError: the root or split does not exist, or has no class folder.
    """
    root, folder = Path(root), Path(root) / split
    if not root.is_dir():
        raise InputError(f"data_dir {root} does not exist. {LAYOUT}")
    if not folder.is_dir():
        raise InputError(
            f"no split {split!r} in {root}; there is {', '.join(_folders(root)) or 'no folder'}. {LAYOUT} "
            "The splits' names are config.data.train_split and config.data.eval_split."
        )
    if not (names := _folders(folder)):
        raise InputError(f"no class folder in {folder}. {LAYOUT}")
    return tuple(names)


def check_same_classes(root: str | Path, train_split: str, eval_split: str) -> None:
    """Checks that two splits have the same class folders, and so the same labels.

    Raises:
        InputError: one split has a class folder that the other lacks.
    """
    for has, lacks in ((train_split, eval_split), (eval_split, train_split)):
        if missing := sorted(set(class_names(root, has)) - set(class_names(root, lacks))):
            raise InputError(
                f"{len(missing)} of the class folders in {Path(root) / has} are not in {Path(root) / lacks}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
                "Labels number the sorted class folders, so both splits must have the same ones."
            )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    # "._x.jpg" is a macOS resource fork, not an image.
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    )
