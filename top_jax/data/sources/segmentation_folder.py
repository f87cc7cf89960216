"""Photographs with label maps: root/images/<split>/*.jpg and root/annotations/<split>/*.png, ADE20K's layout."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Final

import numpy as np

from top_jax.config import DataConfig, RunConfig
from top_jax.data import segmentation_transforms as dense
from top_jax.data.sources.base import Record
from top_jax.data.sources.image_folder import (
    DEFAULT_EVAL_SHARE,
    EVAL_FOLDERS,
    files_in,
    fitted,
    folders_in,
    part_of,
)
from top_jax.data.transforms import EXTENSIONS
from top_jax.errors import InputError
from top_jax.values import counted

logger = logging.getLogger(__name__)

IMAGES, LABELS, CLASSES = "images", "annotations", "classes.txt"
TRAIN_FOLDERS: Final = ("train", "training")  # usual names; the first that exists is used
LAYOUT: Final = (
    f"Needed: DIR/{IMAGES}/NAME.jpg with DIR/{LABELS}/NAME.png, an 8-bit grey PNG of class numbers (or both in folders "
    f"of splits); DIR/{CLASSES} names the classes, one a line."
)
HEADER: Final = 33  # bytes of a PNG that hold its size and kind of pixels
MOST_SCANNED: Final = 5_000  # label maps that `infer` reads to find the number of classes

ADE20K: Final = "ADEChallengeData2016"
ADE20K_IMAGES: Final = {"training": 20_210, "validation": 2_000}
ADE20K_CLASSES: Final = 150
ADE20K_GET: Final = (
    f"Needed: the folder {ADE20K} of http://data.csail.mit.edu/places/ADEchallenge/{ADE20K}.zip, with "
    "images/{training,validation} and annotations/{training,validation}."
)

_noted: set[str] = set()  # folders whose left-out files a warning has named


class SegmentationFolderSource:
    """One split of a folder of photographs with label maps; both stay encoded until they are read.

    A label map has the path of its image, with `annotations` instead of `images`, and ends in .png.

    Attributes:
        unlabelled: the images without a label map, left out; paths in the split's folder.
        unpaired: the label maps without an image, likewise.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: tuple[str, ...],
        eval_share: float | None = None,
        train: bool = True,
    ):
        """Lists the files, reads the header of one label map, and warns of the files that it leaves out.

        Args:
            root: the folder that holds `images` and `annotations`.
            split: folder of the split in both.
            class_names: the name of each class.
            eval_share: both hold files instead of splits, and this share is for evaluation; at least one image is in
                each part. An image's part depends on its name, not on a seed.
            train: with `eval_share`, whether this is the part to train on.

        Raises:
            InputError: a folder does not exist, no image has a label map, two images share a label map, or the label
                map that is read is of another kind.
        """
        self.name, self.class_names, self.num_classes = f"{root}/{split}", class_names, len(class_names)
        if eval_share is not None:
            self.name, split = f"{root} ({'training' if train else 'evaluation'} part)", ""
        self._images, self._labels = (_split_folder(Path(root), kind, split) for kind in (IMAGES, LABELS))
        found = [file for file in files_in(self._images) if file.lower().endswith(EXTENSIONS)]
        maps = {os.path.splitext(file)[0]: file for file in files_in(self._labels) if file.lower().endswith(".png")}
        pairs = [(file, maps[stem]) for file in found if (stem := os.path.splitext(file)[0]) in maps]
        self.unlabelled = [file for file in found if os.path.splitext(file)[0] not in maps]
        self.unpaired = sorted(set(maps.values()) - {label for _, label in pairs})
        if not pairs:
            example = f"; {self.unlabelled[0]} has none" if self.unlabelled else ", which has no image"
            raise InputError(f"no image in {self._images} has a label map in {self._labels}{example}. {LAYOUT}")
        of_map: dict[str, str] = {}
        for file, label in pairs:
            if of_map.setdefault(label, file) != file:
                raise InputError(
                    f"{self._images} holds {of_map[label]} and {file}, but only one label map for both, "
                    f"{self._labels / label}; rename or remove one of the images."
                )
        if eval_share is not None:
            chosen = set(part_of([file for file, _ in pairs], self._images, eval_share, train=train))
            pairs = [pair for pair in pairs if pair[0] in chosen]
        # Arrays of bytes, as in `ImageFolderSource`.
        self._files, self._maps = (np.array([os.fsencode(pair[i]) for pair in pairs]) for i in (0, 1))
        self._note_left_out()
        self._check_first()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        return Record(self._file(index).read_bytes(), self._map(index).read_bytes())

    def describe(self, index: int) -> str:
        """Returns the path of image `index`."""
        return str(self._file(index))

    def describe_labels(self, index: int) -> str:
        """Returns the path of label map `index`."""
        return str(self._map(index))

    def label_size(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of label map `index`; raises OSError or LabelError if it is unusable."""
        with self._map(index).open("rb") as file:
            return dense.png_size(file.read(HEADER))

    def stems(self) -> list[str]:
        """Returns the file names of the images, without folder and ending."""
        return [Path(os.fsdecode(file)).stem for file in self._files.tolist()]

    def _file(self, index: int) -> Path:
        return self._images / os.fsdecode(self._files[index].item())

    def _map(self, index: int) -> Path:
        return self._labels / os.fsdecode(self._maps[index].item())

    def _note_left_out(self) -> None:
        if str(self._images) in _noted or not (self.unlabelled or self.unpaired):
            return
        _noted.add(str(self._images))
        parts = [
            f"{counted(len(files), what)} without {other} ({', '.join(files[:3])}{', ...' * (len(files) > 3)})"
            for files, what, other in ((self.unlabelled, "image", "label map"), (self.unpaired, "label map", "image"))
            if files
        ]
        used = counted(len(self), "labelled image")
        logger.warning("%s: %s; left out: %s", self.name, used, "; ".join(parts))

    def _check_first(self) -> None:
        try:
            self.label_size(0)
        except dense.LabelError as error:
            raise InputError(f"{self.describe_labels(0)} {error}. {LAYOUT}") from error
        except OSError:
            pass  # one damaged file; the reader names it


def _split_folder(root: Path, kind: str, split: str) -> Path:
    if not root.is_dir():
        raise InputError(f"data_dir {root} does not exist. {LAYOUT}")
    if not (root / kind).is_dir():
        raise InputError(f"no folder {kind} in {root}, which holds {_listed(root)}. {LAYOUT}")
    if not (root / kind / split).is_dir():
        raise InputError(
            f"no split {split!r} in {root / kind}; it has {_listed(root / kind)}. {LAYOUT} The splits' names are "
            "config.data.train_split and eval_split; without splits, set config.data.eval_share=0.2."
        )
    return root / kind / split


def _listed(folder: Path) -> str:
    names = folders_in(folder)
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) or "no folder"


def open_folder(config: DataConfig, split: str) -> SegmentationFolderSource:
    """Opens a split of the folder that `config` names."""
    root = _root_of(config)
    share = config.eval_share
    _split_folder(root, IMAGES, "")
    names = class_names_of(root, config.num_classes)
    return SegmentationFolderSource(
        root, split, class_names=names, eval_share=share, train=share is None or split == config.train_split
    )


def _root_of(config: DataConfig) -> Path:
    if config.data_dir is None:
        raise InputError(f"config.data.data_dir is not set; pass --config.data.data_dir=DIR. {LAYOUT}")
    return Path(config.data_dir)


def class_names_of(root: Path, num_classes: int | None) -> tuple[str, ...]:
    """Returns the class names of a folder: the lines of its classes.txt, else "class 0" to the last.

    Raises:
        InputError: there is neither a file nor a number, they contradict each other, or a line is empty or repeated.
    """
    file = root / CLASSES
    try:
        text = file.read_text("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file} ({error}); it needs one class name per line, saved as UTF-8.") from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    for line, name in enumerate(names):
        if not name or name in names[:line]:
            fault = f"is {name!r} again, the name of line {names.index(name) + 1}" if name else "is empty"
            raise InputError(f"line {line + 1} of {file} {fault}; it needs one class name per line, each only once.")
    if not names and num_classes is None:
        raise InputError(
            f"the number of classes in {root} is not known: {file} is missing or empty. Write one name per line, or "
            "pass --config.data.num_classes=N."
        )
    if names and num_classes not in (None, len(names)):
        raise InputError(
            f"{file} names {len(names)} classes, but config.data.num_classes={num_classes}; leave num_classes out, or "
            "correct the file."
        )
    return names or tuple(f"class {number}" for number in range(num_classes or 0))


def infer(config: RunConfig) -> RunConfig:
    """Completes a config from its folder with label maps, where `data.infer` is set.

    - The splits: one of `TRAIN_FOLDERS` and one of `EVAL_FOLDERS` in `images`; else `data.eval_share` of all images is
      for evaluation.
    - The number of classes: from classes.txt, or `data.num_classes`, or the largest label.
    - A smaller batch, as for an image folder.

    Raises:
        InputError: no such folder, or one of another layout.
    """
    data, root = config.data, _root_of(config.data)
    folders = folders_in(_split_folder(root, IMAGES, ""))
    train = next((name for name in TRAIN_FOLDERS if name in folders), None)
    evaluation = next((name for name in EVAL_FOLDERS if name in folders), None)
    data = dataclasses.replace(data, infer=False)
    if train and evaluation:
        data = dataclasses.replace(data, train_split=train, eval_split=evaluation, eval_share=None)
    elif data.eval_share is None:
        data = dataclasses.replace(data, eval_share=DEFAULT_EVAL_SHARE)
    if not (root / CLASSES).is_file() and data.num_classes is None:
        data = dataclasses.replace(data, num_classes=_largest_label(root, data) + 1)
    return fitted(config, data, open_folder(data, data.train_split))


def _largest_label(root: Path, config: DataConfig) -> int:
    """Returns the largest class in all label maps of both splits."""
    folder = _split_folder(root, LABELS, "")
    maps = [file for file in files_in(folder) if file.lower().endswith(".png")]
    if not maps or len(maps) > MOST_SCANNED:
        raise InputError(
            f"{folder} has {len(maps):,} label maps; write {root / CLASSES}, one class name per line, or pass "
            "--config.data.num_classes=N."
        )
    largest = 0
    for file in maps:
        try:
            labels = dense.decode_labels((folder / file).read_bytes())
        except dense.LabelError as error:
            raise InputError(f"{folder / file} {error}. {LAYOUT}") from error
        except OSError:
            continue  # the reader names it
        labels = dense.to_classes(
            labels, 255, ignore_label=config.ignore_label, reduce_zero_label=config.reduce_zero_label
        )
        largest = max(largest, int(labels[labels != dense.IGNORED].max(initial=0)))
    return largest


def open_ade20k(config: DataConfig, split: str) -> SegmentationFolderSource:
    """Opens `training` or `validation` of ADE20K's scene parsing benchmark, with 150 classes.

    `config.data_dir` is the folder ADEChallengeData2016 or the one that holds it. Warns of a number of images other
    than the official one, and of images without labels.

    Raises:
        InputError: it is another folder, such as the instance annotations or the full ADE20K.
    """
    if config.data_dir is None:
        raise InputError(f"config.data.data_dir is not set; pass --config.data.data_dir=DIR. {ADE20K_GET}")
    root = Path(config.data_dir)
    root = root / ADE20K if (root / ADE20K).is_dir() else root
    _check_ade20k(root)
    if not config.reduce_zero_label:
        raise InputError("ADE20K stores class c as c + 1 and 0 for none; set config.data.reduce_zero_label=True.")
    if split not in ADE20K_IMAGES:
        raise InputError(
            f"ADE20K has the splits training and validation, not {split!r}; set config.data.train_split=training and "
            "config.data.eval_split=validation."
        )
    source = SegmentationFolderSource(root, split, class_names=_ade20k_names(root))
    official = ADE20K_IMAGES[split]
    if len(source) != official and f"count {source.name}" not in _noted:
        _noted.add(f"count {source.name}")
        numbered = {f"ADE_{'train' if split == 'training' else 'val'}_{n + 1:08d}" for n in range(official)}
        missing = sorted(numbered - set(source.stems()))
        first = f", such as {missing[0]}" if missing else ""
        logger.warning(
            "%s has %s, and ADE20K has %s: results on it are not ADE20K's (%s missing%s)",
            source.name,
            counted(len(source), "labelled image"),
            f"{official:,}",
            f"{len(missing):,}",
            first,
        )
    return source


def _check_ade20k(root: Path) -> None:
    """Raises InputError unless the folder is laid out as the benchmark; the message says what it is instead."""
    if not root.is_dir():
        raise InputError(f"data_dir {root} does not exist. {ADE20K_GET}")
    folders = folders_in(root)
    if {IMAGES, LABELS} <= set(folders):
        return
    other = None
    if "annotations_instance" in folders:
        other = "holds ADE20K's instance annotations: other classes and files, for another task"
    elif "scene_parse150" in folders:
        other = f"holds TFDS's scene_parse150, {SCENE_PARSE150}"
    elif any(name.startswith("ADE20K_20") for name in (*folders, root.name)) or list(root.glob("index_ade20k.*")):
        other = "is the full ADE20K with over 3,000 classes, not the benchmark with 150"
    raise InputError(f"{root} {other or f'is not ADE20K; there is {_listed(root)}'}. {ADE20K_GET}")


SCENE_PARSE150: Final = (
    "which downloads the instance challenge's annotations and calls validation `test`; it is not the benchmark that "
    "mIoU is reported on"
)


def _ade20k_names(root: Path) -> tuple[str, ...]:
    """Returns the first name of each class in objectInfo150.txt, or numbers if there is no such file."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        if str(file) not in _noted:
            _noted.add(str(file))
            logger.warning("%s is missing, so the classes have numbers for names", file)
        return tuple(f"class {number}" for number in range(ADE20K_CLASSES))
    try:
        rows = [line.split("\t") for line in file.read_text().splitlines() if line[:1].isdigit()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file} ({error}). {ADE20K_GET}") from error
    names = tuple(row[-1].split(",")[0].strip() for row in rows)
    if len(names) != ADE20K_CLASSES:
        raise InputError(f"{file} has {len(names)} classes instead of {ADE20K_CLASSES}. {ADE20K_GET}")
    return names
