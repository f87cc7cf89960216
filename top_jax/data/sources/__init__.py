"""Image sources: scikit-learn's digits, a TFDS directory, a Hugging Face dataset, image folders or a packed file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from top_jax.config import DataConfig, RunConfig
from top_jax.data.sources import image_folder, segmentation_folder
from top_jax.data.sources.base import DenseSource, Record, Source, check_classes, check_split, is_dense
from top_jax.data.sources.digit_scenes import DigitScenesSource
from top_jax.data.sources.digits import DigitsSource
from top_jax.data.sources.huggingface import HuggingFaceSource
from top_jax.data.sources.image_folder import ImageFolderSource, check_same_classes, open_part
from top_jax.data.sources.packed import PackedDenseSource, PackedSource, open_packed
from top_jax.data.sources.segmentation_folder import SegmentationFolderSource
from top_jax.data.sources.tfds import TfdsSource, how_to_prepare
from top_jax.errors import InputError

__all__ = [
    "DenseSource",
    "DigitScenesSource",
    "DigitsSource",
    "HuggingFaceSource",
    "ImageFolderSource",
    "PackedDenseSource",
    "PackedSource",
    "Record",
    "SegmentationFolderSource",
    "Source",
    "TfdsSource",
    "check_classes",
    "infer",
    "is_dense",
    "open_source",
]


logger = logging.getLogger(__name__)

FOLDERS = {"image_folder": "", "segmentation_folder": segmentation_folder.IMAGES}  # by source, what holds the splits

_noted: set[tuple[str | None, str, str]] = set()


def open_source(config: DataConfig, *, train: bool) -> Source:
    """Opens the training or the evaluation split that `config` names.

    Raises:
        InputError: the source is unknown, its data is missing or damaged, or the split is empty; the message says
            what to do.
    """
    openers = {
        "digits": _open_digits,
        "tfds": _open_tfds,
        "hf": _open_hf,
        "image_folder": _open_image_folder,
        "packed": _open_packed,
        "digit_scenes": _open_digit_scenes,
        "ade20k": segmentation_folder.open_ade20k,
        "segmentation_folder": segmentation_folder.open_folder,
    }
    if config.source not in openers:
        raise InputError(f"unknown config.data.source={config.source!r}; use one of {', '.join(openers)}.")
    if config.is_bundled and config.data_dir is not None:  # here and not in DataConfig, so that old runs can be read
        raise InputError(
            f"config.data.data_dir={config.data_dir!r} has no effect with config.data.source={config.source!r}, which "
            "is bundled; set data.source to image_folder, segmentation_folder or another, or drop data_dir."
        )
    _note_same_split(config)
    source = openers[config.source](config, config.train_split if train else config.eval_split)
    check_split(source)
    return source


def infer(config: RunConfig) -> RunConfig:
    """Completes a config from its folder if `data.infer` is set; any other config is returned unchanged.

    The result, which a run keeps, has splits, classes and batch size set, and `data.infer` off.

    Raises:
        InputError: no such folder, or one of another layout.
    """
    if not config.data.infer:
        return config
    of_source = {"image_folder": image_folder.infer, "segmentation_folder": segmentation_folder.infer}
    return of_source[config.data.source](config)


def _note_same_split(config: DataConfig) -> None:
    """Warns, once per process, if the evaluation split is the training split or part of it."""
    train, evaluation = config.train_split, config.eval_split
    same = train == evaluation
    if config.source == "tfds":  # train[:90%] and train[90%:] are disjoint, but train contains both
        parts = [split.partition("[") for split in (train, evaluation)]
        same |= parts[0][0] == parts[1][0] and not (parts[0][1] and parts[1][1])
    elif config.source in FOLDERS and config.data_dir is not None:
        folders = [Path(config.data_dir) / FOLDERS[config.source] / split for split in (train, evaluation)]
        same |= all(map(os.path.isdir, folders)) and os.path.samefile(*folders)
    if config.eval_share is not None:
        if train == evaluation:
            raise InputError(
                "data.eval_share makes two parts, which need two names; data.train_split and data.eval_split are "
                f"both {train!r}."
            )
        same = False
    if same and (noted := (config.data_dir, train, evaluation)) not in _noted:
        _noted.add(noted)
        logger.warning(
            "data.train_split=%r and data.eval_split=%r are the same images: the accuracy will be that of the training "
            "images; choose another data.eval_split.",
            train,
            evaluation,
        )


def _open_digits(config: DataConfig, split: str) -> Source:
    del config  # the data is bundled
    return DigitsSource(split)


def _open_digit_scenes(config: DataConfig, split: str) -> Source:
    del config  # the data is bundled
    return DigitScenesSource(split)


def _open_tfds(config: DataConfig, split: str) -> Source:
    name = config.name
    if name is None:
        raise InputError("config.data.source='tfds' needs config.data.name, such as 'cifar10' or 'imagenet2012:5.1.0'.")
    if re.split("[:/]", name)[0] == "scene_parse150":
        raise InputError(
            f"TFDS's scene_parse150 is refused: it is a set {segmentation_folder.SCENE_PARSE150}. Set "
            f"config.data.source=ade20k. {segmentation_folder.ADE20K_GET}"
        )
    if config.data_dir is None:
        raise InputError(
            f"config.data.data_dir is not set; pass --config.data.data_dir=DIR, a TFDS data_dir with {name} in "
            f"array_record format. {how_to_prepare(name, 'DIR')}"
        )
    return TfdsSource(name, config.data_dir, split)


def _open_image_folder(config: DataConfig, split: str) -> Source:
    root = config.data_dir
    if root is None:
        raise InputError(
            "config.data.data_dir is not set; pass --config.data.data_dir=DIR, laid out as DIR/<split>/<class>/*.jpg."
        )
    if config.eval_share is not None:
        return open_part(config, train=split == config.train_split)
    source = ImageFolderSource(root, split)
    other = config.eval_split if split == config.train_split else config.train_split
    # Evaluation needs only its own split, so the classes are compared only if the other split exists.
    if other != split and (Path(root) / other).is_dir():
        check_same_classes(root, config.train_split, config.eval_split)
    return source


def _open_hf(config: DataConfig, split: str) -> Source:
    return HuggingFaceSource(config.name, config.data_dir, split)


def _open_packed(config: DataConfig, split: str) -> Source:
    if config.data_dir is None:
        raise InputError(
            "config.data.data_dir is not set; pass --config.data.data_dir=FILE.npz, as top-jax pack writes it."
        )
    return open_packed(config.data_dir, split, config)
