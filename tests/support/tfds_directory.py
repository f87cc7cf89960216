"""Writes a TFDS data_dir for the tests: array_record, no TensorFlow."""

from __future__ import annotations

import json
from pathlib import Path


def write_tfds(
    root: Path,
    name: str,
    classes: int,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    file_name: str | None = None,
) -> Path:
    """Writes dataset `name` 1.0.0 of encoded images and labels, one uncompressed shard per split; returns `root`.

    `file_name`, such as "n{}.JPEG", adds a feature of that name for every record, formatted with its index.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    named = {} if file_name is None else {"file_name": tfds.features.Text()}
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=classes),
            **named,
        }
    )
    features.save_config(directory)
    entries = []
    for split, records in splits.items():
        file = directory / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for index, (image, label) in enumerate(records):
            extra = {name: str(file_name).format(index) for name in named}
            writer.write(features.serialize_example({"image": image, "label": label, **extra}))
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        shards = {"shardLengths": [str(len(records))], "numBytes": "1", "filepathTemplate": template}
        entries.append({"name": split, **shards})
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "moduleName": "x", "splits": entries}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return root
