"""Images in folders: root/<split>/<class>/*.jpg, as most people store ImageNet, or root/<class>/*.jpg, split here."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from top_jax.config import DataConfig, ModelConfig, RunConfig
from top_jax.data.sources.base import Record, Source
from top_jax.data.transforms import EXTENSIONS
from top_jax.errors import InputError

logger = logging.getLogger(__name__)

LAYOUT = "An image folder is laid out as <data_dir>/<split>/<class>/*.jpg."
EVAL_FOLDERS: Final = ("val", "valid", "validation", "test", "eval")  # usual names; the first that exists is used
ONE_FOLDER: Final = "Needed: FOLDER/<class>/*.jpg, or FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg."
DEFAULT_EVAL_SHARE: Final = 0.2
STEPS_AN_EPOCH: Final = 4  # least number, with an inferred batch size


_noted: set[str] = set()  # folders whose left-out files a warning has named


class ImageFolderSource:
    """One split of an image folder; the label of a class is its index in the sorted class names.

    Attributes:
        classes: the names of the class folders, sorted.
        labels: int32 [N], the label of every image.
        left_out: number of files that are not images or lie next to the class folders, by ending ("" for none). Hidden
            files are not counted.
    """

    def __init__(self, root: str | Path, split: str, *, eval_share: float | None = None, train: bool = True):
        """Lists the files without opening them, and warns of those that it leaves out.

        Args:
            root: the folder.
            split: folder of the split in it.
            eval_share: root holds the class folders itself, and this share of each class is for evaluation; at least
                one image of each class is in each part. An image's part depends on its name, not on a seed.
            train: with `eval_share`, whether this is the part to train on.

        Raises:
            InputError: the root or split does not exist or cannot be read, has no class folder, or a class has no
                image.
        """
        self.name = f"{root}/{split}"
        if eval_share is not None:
            self.name, split = f"{root} ({'training' if train else 'evaluation'} part)", ""
        self._folder = Path(root) / split
        self.classes = class_names(root, split)
        names, labels = [], []
        # Files next to the class folders belong to no class.
        beside = [entry.name for entry in _entries(self._folder) if not entry.is_dir()]
        self.left_out = collections.Counter(map(_ending, beside))
        for label, class_name in enumerate(self.classes):
            files = []
            for file in files_in(self._folder / class_name):
                if file.lower().endswith(EXTENSIONS):
                    files.append(file)
                else:
                    self.left_out[_ending(file)] += 1
            if not files:
                raise InputError(
                    f"no image in {self._folder / class_name}; it needs files ending in {', '.join(EXTENSIONS)}. "
                    f"Add images or remove the folder.{_counted(self.left_out)}"
                )
            if eval_share is not None:
                files = part_of(files, self._folder / class_name, eval_share, train=train)
            names += [os.fsencode(f"{class_name}/{file}") for file in files]
            labels += [label] * len(files)
        # One array of bytes: sending a million Path or str objects to each worker process would take seconds.
        self._names = np.array(names)
        self.labels = np.array(labels, np.int32)
        if self.left_out and str(self._folder) not in _noted:
            _noted.add(str(self._folder))
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


def part_of(files: list[str], folder: Path, eval_share: float, *, train: bool) -> list[str]:
    """Returns the files of a folder for training or evaluation, in their order.

    Raises:
        InputError: there is only one image.
    """
    if len(files) < 2:
        raise InputError(
            f"{folder} has one image, but data.eval_share={eval_share} needs two: one to train on, one to evaluate."
        )
    count = min(max(1, round(eval_share * len(files))), len(files) - 1)
    digest = {file: hashlib.sha256(f"{folder.name}/{file}".encode(errors="surrogateescape")).digest() for file in files}
    chosen = set(sorted(files, key=digest.__getitem__)[:count])
    return [file for file in files if (file in chosen) is not train]


def infer(config: RunConfig) -> RunConfig:
    """Completes a config from its image folder, where `data.infer` is set.

    - The splits: the folders `train` and one of `EVAL_FOLDERS`. If there is only `train`, or the class folders
      themselves, `data.eval_share` of each class is for evaluation.
    - `model.num_classes`.
    - Smaller batches, where the configured ones leave fewer than `STEPS_AN_EPOCH` steps per epoch.

    Raises:
        InputError: no such folder, or one of another layout.
    """
    data = config.data
    if data.data_dir is None:
        raise InputError(
            "config.data.infer takes the classes, splits and sizes from an image folder; pass "
            "--config.data.data_dir=FOLDER, with one folder of images per class."
        )
    root = Path(data.data_dir)
    if not root.is_dir():
        raise InputError(f"data_dir {root} does not exist. {ONE_FOLDER}")
    if not (folders := folders_in(root)):
        raise InputError(f"no class folder in {root}. {ONE_FOLDER}")
    evaluation = next((name for name in EVAL_FOLDERS if name in folders), None)
    if "train" in folders and evaluation and folders_in(root / "train"):
        data = dataclasses.replace(data, infer=False, train_split="train", eval_split=evaluation, eval_share=None)
    else:
        inside = root / "train" if folders == ["train"] and folders_in(root / "train") else root
        share = DEFAULT_EVAL_SHARE if data.eval_share is None else data.eval_share
        data = dataclasses.replace(data, infer=False, data_dir=str(inside), eval_share=share)
    return fitted(config, data, open_part(data, train=True))


def fitted(config: RunConfig, data: DataConfig, train: Source) -> RunConfig:
    """Returns a run on `data`: the classes of `train`, batches halved until an epoch has `STEPS_AN_EPOCH`.

    A segmenter's batches have at least two images, because a BatchNorm in its heads sees one value per image.

    Raises:
        InputError: `model.num_classes` is set to another number than the data's.
    """
    if config.model.num_classes not in (ModelConfig.num_classes, train.num_classes):
        raise InputError(
            f"config.model.num_classes={config.model.num_classes}, but {train.name} has {train.num_classes} classes; "
            "leave it out, because it comes from the data."
        )
    batch_size, least = config.batch_size, min(2, len(train)) if config.model.is_segmenter else 1
    while batch_size > max(least, len(train) // STEPS_AN_EPOCH):
        batch_size //= 2
    model = dataclasses.replace(config.model, num_classes=train.num_classes)
    return dataclasses.replace(config, data=data, batch_size=batch_size, model=model)


def open_part(config: DataConfig, *, train: bool) -> ImageFolderSource:
    """Opens a split of the image folder that `config` names."""
    split = config.train_split if train else config.eval_split
    return ImageFolderSource(str(config.data_dir), split, eval_share=config.eval_share, train=train)


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
            f"no split {split!r} in {root}; it has {', '.join(folders_in(root)) or 'no folder'}. {LAYOUT} "
            "The splits' names are config.data.train_split and config.data.eval_split."
        )
    if not (names := folders_in(folder)):
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


def folders_in(folder: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, without hidden ones."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder without hidden ones; "._x.jpg" is a macOS resource fork, not an image."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); correct its path or its permissions.") from error


def files_in(folder: Path) -> Iterator[str]:
    """Yields the paths in `folder` of its files and of those in its sub-folders, in torchvision's order.

    A folder to which several links lead is read once. One that contains `folder` is skipped: its images have other
    classes. Pipes and devices are left out.
    """
    outside = map(os.stat, folder.absolute().parents)
    seen, waiting = {(status.st_dev, status.st_ino) for status in outside}, [""]
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
    """Returns a sentence, after a space, on the files that are left out; empty if there are none."""
    if not left_out:
        return ""
    endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in left_out.most_common(5))
    more = ", ..." * (len(left_out) > 5)
    files = f"{left_out.total()} file{'s are' if left_out.total() > 1 else ' is'}"
    return f" {files} left out ({endings}{more}); images lie in a class folder and end in {', '.join(EXTENSIONS)}."
