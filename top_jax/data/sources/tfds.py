"""A prepared TFDS dataset in array_record format, read without TensorFlow.

The directory is checked with plain pathlib before TFDS sees it: TFDS would try to download and prepare a dataset that
it does not find.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from top_jax.data.sources.base import Record
from top_jax.errors import InputError
from top_jax.optional import optional_package

PREPARE = (
    "Prepare it in another environment (it needs TensorFlow): pip install tensorflow tensorflow-datasets "
    "array_record && tfds build {name} --data_dir={data_dir} --file_format=array_record"
)
IMAGENET_TARS = (
    "; for imagenet2012 first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from image-net.org) "
    "into {data_dir}/downloads/manual"
)


AGAIN = "copy or prepare the dataset again."
_OWN_CLASS = re.compile(r"tensorflow_datasets(\.core\.features(\.[A-Za-z]\w*)*)?\.[A-Za-z]\w*")


class TfdsSource:
    """One split of a TFDS dataset with the features "image" and "label"; images stay encoded."""

    def __init__(self, name: str, data_dir: str | Path, split: str):
        """Opens the dataset without reading a record.

        Args:
            name: "cifar10", "imagenet2012:5.1.0" or "name/config:version"; without a version, the newest in `data_dir`.
            data_dir: the TFDS data_dir that holds `name`.
            split: name of a split, or a TFDS slice of it such as "train[:10%]".

        Raises:
            InputError: the dataset, version, split or a file is missing or damaged, or it is not array_record with
                images.
        """
        directory = find_dataset(name, data_dir)
        info = _read_json(directory / "dataset_info.json")
        _check_format(directory, info)
        split_name = _check_split(directory, info, split)
        _check_features(directory / "features.json")

        optional_package("array_record", purpose="data.source=tfds")  # TFDS imports it later
        # Takes seconds, so only after the checks and only if needed.
        tfds = optional_package("tensorflow_datasets", purpose="data.source=tfds")
        try:
            builder: Any = tfds.builder_from_directory(directory)
            features = builder.info.features
        except Exception as error:  # TFDS does not check its files
            raise InputError(_damaged(directory, error)) from error
        if not {"image", "label"} <= set(features):
            raise InputError(
                f"{directory} has the features {sorted(features)}, but training needs 'image' and 'label'; choose a "
                "dataset with both."
            )
        label, decoders = features["label"], {"image": tfds.decode.SkipDecoding()}  # our own PIL decoder reads images
        if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
            raise InputError(f"the feature 'label' of {directory} is {label}; it must be a ClassLabel with classes.")
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except ValueError as error:
            raise InputError(f"TFDS cannot read split {split!r} of {directory}: {error}") from error
        except Exception as error:
            raise InputError(_damaged(directory, error)) from error
        # Checked after as_data_source: until then, a dataset converted in place lists the files of its older format.
        _check_files(directory, builder.info.splits[split_name].filepaths)
        parts = builder.info.splits[split].file_instructions
        self._shards = [Path(part.filename).name for part in parts]
        self._ends = list(itertools.accumulate(part.take for part in parts))
        self.name = f"{builder.info.full_name}/{split}"
        self.num_classes: int = label.num_classes
        self.class_names: tuple[str, ...] = tuple(label.names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._read(index)
        return Record(record["image"], int(record["label"]))

    def describe(self, index: int) -> str:
        """Returns a name for record `index`, with its file name if the dataset has one, or its shard if damaged."""
        try:
            file_name = self._read(index).get("file_name", b"").decode(errors="replace")
        except OSError:
            file_name = f"in {self._shard(index)}"
        return f"{self.name} record {index}" + (f" ({file_name})" if file_name else "")

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except Exception as error:  # RuntimeError of array_record for a wrong hash; others if it is not a tf.Example
            raise OSError(" ".join(str(error).split())) from error

    def _shard(self, index: int) -> str:
        return self._shards[bisect.bisect_right(self._ends, index)]


def find_dataset(name: str, data_dir: str | Path) -> Path:
    """Returns the directory data_dir/name[/config]/version that has a dataset_info.json.

    Raises:
        InputError: there is none; the message lists what exists, and says how to prepare the dataset.
    """
    root, (dataset, _, version) = Path(data_dir).expanduser(), name.partition(":")
    if not root.is_dir():
        raise InputError(f"data_dir {root} does not exist. {how_to_prepare(name, root)}")
    if not (root / dataset).is_dir():
        raise InputError(f"no dataset {dataset!r} in {root}; it has {_listing(root)}. {how_to_prepare(name, root)}")
    versions = sorted((path.parent for path in (root / dataset).glob("*/dataset_info.json")), key=_version_key)
    chosen = [path for path in versions if version in ("", path.name)]
    if not chosen:
        wanted = f"version {version} of {dataset!r}" if version else f"prepared version of {dataset!r}"
        raise InputError(
            f"no {wanted} in {root / dataset}; it has {_listing(root / dataset)}. "
            f"Name it as <dataset>[/<config>][:<version>] in config.data.name. {how_to_prepare(name, root)}"
        )
    return chosen[-1]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"it holds a {type(content).__name__}, not an object"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise InputError(f"{file} cannot be read ({problem}); {AGAIN}")


def _check_features(file: Path) -> None:
    """Checks the classes that features.json names, because TFDS imports the module of any class it does not know.

    Raises:
        InputError: the file is damaged, or names a class outside TFDS.
    """
    waiting: list[Any] = [_read_json(file)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key in ("pythonClassName", "python_class_name", "type", "proto_cls"):  # the last two of old releases
                name = node.get(key)
                if isinstance(name, str) and "." in name and not _OWN_CLASS.fullmatch(name):
                    raise InputError(
                        f"{file} names the class {name!r}, which is not one of TFDS's features; reading it would run "
                        f"that module. {AGAIN.capitalize()}"
                    )
        if isinstance(node, str) and node.lstrip().startswith("{"):  # old releases keep JSON as text inside JSON
            with contextlib.suppress(ValueError, RecursionError):
                waiting.append(json.loads(node))
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node


def _damaged(directory: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"TFDS cannot open {directory} ({type(error).__name__}: {reason}); {AGAIN}"


def _check_format(directory: Path, info: dict[str, Any]) -> None:
    others = info.get("alternativeFileFormats", [])
    # TFDS's default is tfrecord.
    formats = {str(info.get("fileFormat", "tfrecord")), *(map(str, others) if isinstance(others, list) else ())}
    if "array_record" not in formats:
        raise InputError(
            f"{directory} is prepared as {', '.join(sorted(formats))}, which needs TensorFlow; array_record is "
            "needed here. Convert it in place in another environment: pip install tensorflow tensorflow-datasets "
            "array_record apache-beam && python -m tensorflow_datasets.scripts.convert_format "
            f"--dataset_version_dir={directory} --out_file_format=array_record"
        )


def _check_split(directory: Path, info: dict[str, Any], split: str) -> str:
    """Returns the name of the split that the slice `split` is taken from; raises InputError if it does not exist."""
    splits = info.get("splits", [])
    if not isinstance(splits, list) or not all(isinstance(split, dict) and "name" in split for split in splits):
        raise InputError(f"the splits in {directory / 'dataset_info.json'} are damaged; {AGAIN}")
    names = [str(entry["name"]) for entry in splits]
    wanted = split.partition("[")[0]
    if wanted not in names:
        raise InputError(
            f"no split {wanted!r} in {directory}; it has {', '.join(names) or 'none'}. "
            "Set config.data.train_split and config.data.eval_split."
        )
    return wanted


def _check_files(directory: Path, files: Iterable[Any]) -> None:
    if missing := [Path(file).name for file in files if not Path(file).is_file()]:
        raise InputError(
            f"{len(missing)} of the files that dataset_info.json lists are not in {directory}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. {AGAIN.capitalize()}"
        )


def how_to_prepare(name: str, data_dir: str | Path) -> str:
    """Returns the command that prepares dataset `name`, for a message."""
    text = PREPARE + (IMAGENET_TARS if name.startswith("imagenet2012") else "") + "."
    return text.format(name=name, data_dir=data_dir)


def _listing(directory: Path) -> str:
    return ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"


def _version_key(directory: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", directory.name))
