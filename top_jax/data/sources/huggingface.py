"""Image classification datasets of the `datasets` library (extra `hf`): from the Hub, its cache, or local files."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Final

import numpy as np

from top_jax.data.sources.base import Record
from top_jax.errors import InputError
from top_jax.optional import optional_package

logger = logging.getLogger(__name__)

USUAL_LABELS: Final = ("label", "labels", "class", "target")  # the first column that exists is used


class HuggingFaceSource:
    """One split of a Hugging Face dataset with an image column and a label column; images stay encoded.

    The image column is the one with the feature `Image`. The label column is a `ClassLabel`: the one with a usual name
    (`USUAL_LABELS`), else the one with the most classes. A column of strings or integers with a usual name is accepted
    too; its classes are then its sorted values in this split.

    Attributes:
        labels: int64 [N], the label of every image.
    """

    def __init__(self, name: str | None, data_dir: str | Path | None, split: str):
        """Opens the split; one on the Hub is downloaded, unless it is cached or HF_HUB_OFFLINE=1 is set.

        Args:
            name: a dataset on the Hub, such as `cifar10` or `owner/name`, or a loader of local files: `imagefolder` or
                `parquet`. None: `data_dir` holds what `save_to_disk` wrote, or .parquet files.
            data_dir: the files of a loader or of `save_to_disk`; for a dataset on the Hub, its cache.
            split: such as `train`, or a slice such as `train[:10%]` (not after `save_to_disk`).

        Raises:
            InputError: the dataset or split cannot be found or read, or has no image or no label column.
        """
        datasets = optional_package("datasets", purpose="data.source=hf")
        self.name = f"{name or data_dir}/{split}"
        table = _open(datasets, name, data_dir, split)
        self._image = _image_column(table, self.name)
        label = _label_column(table, self.name)
        self.class_names, self.labels = _classes(table, label, self.name)
        self.num_classes = len(self.class_names)
        self._records = table.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        image = self._read(index)
        if image.get("bytes") is not None:
            return Record(image["bytes"], int(self.labels[index]))
        if image.get("path"):
            return Record(Path(image["path"]).read_bytes(), int(self.labels[index]))
        raise OSError("the record has neither bytes nor a path")

    def describe(self, index: int) -> str:
        """Returns a name for record `index`, with its file name if the dataset has one."""
        with contextlib.suppress(OSError):
            if path := self._read(index).get("path"):
                return f"{self.name} record {index} ({path})"
        return f"{self.name} record {index}"

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index][self._image] or {}
        except Exception as error:  # pyarrow's errors for damaged files
            raise OSError(" ".join(str(error).split())) from error


def _open(datasets: Any, name: str | None, data_dir: str | Path | None, split: str) -> Any:
    """Returns the split as a `datasets.Dataset`."""
    if name is None and data_dir is None:
        raise InputError(
            "config.data.source='hf' needs config.data.name, such as 'cifar10' or 'imagefolder', or "
            "config.data.data_dir with what save_to_disk wrote."
        )
    if name in (None, "imagefolder", "parquet") and not Path(data_dir or "").is_dir():
        raise InputError(f"data_dir {data_dir} does not exist; pass --config.data.data_dir=DIR with the dataset.")
    try:
        if name is None and not any(Path(str(data_dir)).glob("**/*.parquet")):
            return _of_disk(datasets, Path(str(data_dir)), split)
        if name is None:
            return datasets.load_dataset("parquet", data_dir=str(data_dir), split=split)
        where = {"data_dir" if name in ("imagefolder", "parquet") else "cache_dir": data_dir}
        return datasets.load_dataset(
            name, split=split, **{key: str(value) for key, value in where.items() if value is not None}
        )
    except InputError:
        raise
    except Exception as error:  # from the Hub, the network, the files or pyarrow
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"datasets cannot open {name or data_dir}/{split} ({reason}); check config.data.name, data_dir, "
            "train_split and eval_split."
        ) from error


def _of_disk(datasets: Any, folder: Path, split: str) -> Any:
    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        raise InputError(f"{folder} holds one split without a name; save a DatasetDict with train and test there.")
    if split not in found:
        raise InputError(f"no split {split!r} in {folder}; it has {', '.join(found)}.")
    return found[split]


def _image_column(table: Any, name: str) -> str:
    images = [column for column, feature in table.features.items() if type(feature).__name__ == "Image"]
    if len(images) == 1:
        return images[0]
    has = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in table.features.items())
    raise InputError(f"{name} has {len(images)} image columns, but one is needed; its columns are {has}.")


def _label_column(table: Any, name: str) -> str:
    """Returns the column with the labels; warns if there were several to choose from."""
    features = table.features
    classes = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    values = [column for column, feature in features.items() if getattr(feature, "dtype", "") in _PLAIN]
    usual = [column for column in USUAL_LABELS if column in classes] or [
        column for column in USUAL_LABELS if column in values and not classes
    ]
    if usual:
        return usual[0]
    if not classes:
        has = ", ".join(f"{column} ({getattr(feature, 'dtype', feature)})" for column, feature in features.items())
        raise InputError(
            f"{name} has no label column: needed is a ClassLabel, or a column named {', '.join(USUAL_LABELS)}; its "
            f"columns are {has}."
        )
    chosen = max(classes, key=lambda column: features[column].num_classes)
    if len(classes) > 1:
        logger.warning("%s has the label columns %s; taking %s", name, ", ".join(classes), chosen)
    return chosen


_PLAIN: Final = ("string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def _classes(table: Any, column: str, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of the classes, and the label of every record; a missing label is -1."""
    feature, values = table.features[column], table.with_format(None)[column][:]
    if type(feature).__name__ == "ClassLabel":
        names = tuple(feature.names)
        return names, np.array([-1 if value is None else value for value in values], np.int64)
    if missing := sum(value is None for value in values):
        raise InputError(f"{name} has {missing} records without a {column}; remove them from the dataset.")
    known = sorted(set(values))
    place = {value: label for label, value in enumerate(known)}
    return tuple(map(str, known)), np.array([place[value] for value in values], np.int64)
