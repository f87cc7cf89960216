"""Images in folders, as most people store ImageNet: root/<split>/<class>/*.jpg, or in sub-folders of a class."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from top_jax.data.sources.base import Record
from top_jax.data.transforms import FORMATS
from top_jax.errors import InputError

logger = logging.getLogger(__name__)

EXTENSIONS = tuple(ending for endings in FORMATS.values() for ending in endings)  # of lower or upper case
LAYOUT = "An image folder is laid out as <data_dir>/<split>/<class>/*.jpg."


class ImageFolderSource:
    """One split of an image folder; the label of a class is its index in the sorted class names.

    Attributes:
        classes: the names of the class folders, sorted.
        labels: int32 [N], the label of every image.
        left_out: number of files that are no images or lie beside the class folders, by ending ("" for none). Hidden
            files are not counted.
    """

    def __init__(self, root: str | Path, split: str):
        """Lists the files without opening them, and warns of those that it leaves out.

        Raises:
            InputError: the root or split does not exist or cannot be read, has no class folder, or a class has no
                image.
        """
        self.name = f"{root}/{split}"
        self._folder = Path(root) / split
        self.classes = class_names(root, split)
        names, labels = [], []
        # Files beside the class folders belong to no class.
        beside = [entry.name for entry in _entries(self._folder) if not entry.is_dir()]
        self.left_out = collections.Counter(map(_ending, beside))
        for label, class_name in enumerate(self.classes):
            files = []
            for file in _files(self._folder / class_name):
                if file.lower().endswith(EXTENSIONS):
                    files.append(file)
                else:
                    self.left_out[_ending(file)] += 1
            if not files:
                raise InputError(
                    f"no image in {self._folder / class_name}; it needs files ending in {', '.join(EXTENSIONS)}. "
                    f"Add images or remove the folder.{_counted(self.left_out)}"
                )
            names += [os.fsencode(f"{class_name}/{file}") for file in files]
            labels += [label] * len(files)
        # One array of bytes: sending a million Path or str objects to each worker process would take seconds.
        self._names = np.array(names)
        self.labels = np.array(labels, np.int32)
        if self.left_out:
            logger.warning("%s: %s", self.name, _counted(self.left_out).strip())

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
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Returns what a folder holds but hidden names; "._x.jpg" is a macOS resource fork, not an image."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from error


def _files(folder: Path) -> Iterator[str]:
    """Yields the paths in `folder` of its files and of those in its sub-folders, in torchvision's order.

    A folder to which links lead twice is read once. Pipes and devices are left out.
    """
    seen, waiting = set(), [""]
    while waiting:
        inside = waiting.pop()
        status = os.stat(folder / inside)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = [], []
        for entry in _entries(folder / inside):
            if entry.is_dir():
                folders.append(f"{inside}{entry.name}/")
            elif entry.is_file() or not os.path.exists(entry.path):  # a broken link is an unreadable image
                files.append(f"{inside}{entry.name}")
        yield from sorted(files)
        waiting += sorted(folders, reverse=True)


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _counted(left_out: collections.Counter[str]) -> str:
    """Says which files are left out, as a sentence after a space; empty without any."""
    if not left_out:
        return ""
    endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in left_out.most_common(5))
    more = ", ..." * (len(left_out) > 5)
    files = f"{left_out.total()} file{'s are' if left_out.total() > 1 else ' is'}"
    return f" {files} left out ({endings}{more}); images lie in a class folder and end in {', '.join(EXTENSIONS)}."
