"""The sources: their records, pickling, and the errors for missing or damaged data."""

import dataclasses
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_directory import write_tfds

from top_jax.config import DataConfig
from top_jax.data import eval_batches, sources, train_batches
from top_jax.data.sources import DigitsSource, ImageFolderSource, TfdsSource, open_source
from top_jax.data.transforms import DECODE_ERRORS
from top_jax.errors import InputError

TFDS = DataConfig(source="tfds", name="toy")
CIFAR10_TEST = "cifar10-test.array_record-00000-of-00001"
SHARD = "toy-train.array_record-00000-of-00001"


def jpeg(color, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "JPEG", quality=95)
    return file.getvalue()


def make_folder(root, classes, split="train", images=2):
    for place, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(images):
            (folder / f"{i}.jpg").write_bytes(jpeg((60 * place, 60 * i, 0)))
    return root


@pytest.fixture(scope="module")
def toy_tfds(tmp_path_factory):
    """A TFDS data_dir with `toy` 1.0.0: five JPEGs, three classes."""
    records = [(jpeg((50 * i, 0, 0)), i % 3) for i in range(5)]
    return write_tfds(tmp_path_factory.mktemp("tfds"), "toy", 3, {"train": records}, file_name="n{}.JPEG")


def edited(toy_tfds, tmp_path, **changes):
    """A data_dir whose dataset_info.json differs from toy_tfds's by `changes`."""
    directory = tmp_path / "toy" / "1.0.0"
    directory.mkdir(parents=True)
    for file in (toy_tfds / "toy" / "1.0.0").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | changes))
    return str(tmp_path)


def test_digits_split_is_stratified_disjoint_and_complete():
    splits = {name: DigitsSource(name) for name in ("train", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    shares = {}
    for name, split in splits.items():
        labels = [split[i].label for i in range(len(split))]
        shares[name] = np.bincount(labels, minlength=10) / len(labels)
    np.testing.assert_allclose(shares["train"], shares["test"], atol=0.003)
    images = [split[i].image for split in splits.values() for i in range(len(split))]
    from sklearn.datasets import load_digits

    ours = sorted(image[..., 0].tobytes() for image in images)
    assert ours == sorted(np.round(grey * 255 / 16).astype(np.uint8).tobytes() for grey in load_digits().images)


def test_digits_are_rgb_bytes_up_to_white():
    record = DigitsSource("test")[0]
    assert isinstance(record.image, np.ndarray)
    assert record.image.shape == (8, 8, 3) and record.image.dtype == np.uint8
    assert max(DigitsSource("test")[i].image.max() for i in range(20)) == 255
    np.testing.assert_array_equal(record.image[..., 0], record.image[..., 2])


def test_digits_refuse_another_split():
    with pytest.raises(InputError, match="'validation'.* train, test"):
        DigitsSource("validation")


def test_image_folder_numbers_sorted_classes(tmp_path):
    make_folder(tmp_path, ["b", "a", "c"])
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "x.JPEG").write_bytes(jpeg("white"))
    (tmp_path / "train" / ".cache").mkdir()
    source = ImageFolderSource(tmp_path, "train")
    assert source.classes == ("a", "b", "c") and source.num_classes == 3
    assert [source[i].label for i in range(len(source))] == [0, 0, 0, 1, 1, 2, 2]
    assert source.describe(2) == str(tmp_path / "train" / "a" / "x.JPEG")
    assert source[2].image == jpeg("white")


def test_image_folder_reads_every_format_and_sub_folder_and_counts_the_rest(tmp_path, caplog):
    make_folder(tmp_path, ["cat", "dog"])
    cat = tmp_path / "train" / "cat"
    flat = ["a.BMP", "b.tif", "c.TIFF", "d.webp", "e.gif", "f.jpe", "g.PNG"]
    taken = [*flat, "day1/x.jpg", "day1/deep/y.Jpg", "day2/z.png"]
    for name in [*taken, "notes.txt", "README", "day1/list.TXT", ".hidden.jpg", ".cache/z.jpg", "h.eps"]:
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        (cat / name).write_bytes(jpeg("white"))
    (cat / "day2" / "loop").symlink_to(cat)
    (cat / "day3").symlink_to(cat / "day1")
    os.mkfifo(cat / "pipe.jpg")
    (tmp_path / "train" / "beside.jpg").write_bytes(jpeg("white"))
    (cat / "gone.jpg").symlink_to("nowhere")
    source = ImageFolderSource(tmp_path, "train")
    found = [os.path.relpath(source.describe(i), cat) for i in range(len(source))]
    assert found[:-2] == sorted([*flat, "0.jpg", "1.jpg", "gone.jpg"]) + taken[len(flat) :]
    assert source.labels.tolist() == [0] * (len(found) - 2) + [1, 1]
    assert source.left_out == {".txt": 2, "": 1, ".eps": 1, ".jpg": 1}
    [record] = caplog.records
    assert re.search(r"train: 5 files are .*2 .txt.*1 without ending.*1 .eps", record.getMessage())
    caplog.clear()
    make_folder(tmp_path, ["cat"], split="clean")
    assert not ImageFolderSource(tmp_path, "clean").left_out and not caplog.records


def test_one_split_for_training_and_evaluation_is_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sources, "_noted", set())
    make_folder(tmp_path, ["cat"])
    (tmp_path / "other").symlink_to(tmp_path / "train")
    make_folder(tmp_path, ["cat"], split="val")
    folder = DataConfig(source="image_folder", data_dir=str(tmp_path))
    for changes, warned in (
        ({"eval_split": "val"}, 0),
        ({"eval_split": "train"}, 1),
        ({"eval_split": "other"}, 1),
        ({"eval_split": "val/../train"}, 1),
    ):
        caplog.clear()
        for train in (True, False, True):
            open_source(dataclasses.replace(folder, **changes), train=train)
        assert len(caplog.records) == warned, changes


@pytest.mark.parametrize(
    ("train", "evaluation", "warned"),
    [("train", "train[:40%]", 1), ("train[:40%]", "train[40%:]", 0), ("train[:40%]", "train[:40%]", 1)],
)
def test_parts_of_one_split(toy_tfds, caplog, monkeypatch, train, evaluation, warned):
    monkeypatch.setattr(sources, "_noted", set())
    config = dataclasses.replace(TFDS, data_dir=str(toy_tfds), train_split=train, eval_split=evaluation)
    open_source(config, train=True)
    assert sum("same images" in record.getMessage() for record in caplog.records) == warned


def test_links_out_of_a_class(tmp_path):
    """A link to a folder around its class would give it the images of the others; a broken one is unreadable."""
    make_folder(tmp_path, "ab", images=1)
    (tmp_path / "train" / "a" / "all").symlink_to("..")
    (tmp_path / "train" / "b" / "zzz.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train" / "b" / "pipe.png")
    source = ImageFolderSource(tmp_path, "train")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.describe(2) == f"{tmp_path}/train/b/zzz.png"
    with pytest.raises(DECODE_ERRORS):
        source[2]
    (tmp_path / "train" / "c").symlink_to("..")
    with pytest.raises(InputError, match=r"no image in .*train/c"):
        ImageFolderSource(tmp_path, "train")


def test_image_folder_file_names_may_be_unicode(tmp_path):
    folder = tmp_path / "train" / "köter"
    folder.mkdir(parents=True)
    (folder / "größe.png").write_bytes(jpeg("red"))
    source = pickle.loads(pickle.dumps(ImageFolderSource(tmp_path, "train")))
    assert source.describe(0).endswith("köter/größe.png") and source[0].image == jpeg("red")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("root", "nowhere does not exist"),
        ("split", "no split 'test' .* train"),
        ("classes", "no class folder in .*test"),
        ("images", "no image in .*cat"),
    ],
)
def test_image_folder_says_what_is_missing(tmp_path, missing, message):
    make_folder(tmp_path, ["cat"])
    split = "test" if missing in ("split", "classes") else "train"
    if missing == "classes":
        (tmp_path / "test").mkdir()
    if missing == "images":
        for file in (tmp_path / "train" / "cat").iterdir():
            file.unlink()
    with pytest.raises(InputError, match=message):
        ImageFolderSource(tmp_path / "nowhere" if missing == "root" else tmp_path, split)


def test_splits_with_other_classes_are_refused(tmp_path):
    make_folder(tmp_path, ["cat", "dog"])
    make_folder(tmp_path, ["cat", "eel"], split="test")
    config = DataConfig(source="image_folder", data_dir=str(tmp_path))
    for train in (True, False):
        with pytest.raises(InputError, match="1 .*train .*test: dog"):
            open_source(config, train=train)


def test_evaluation_needs_only_its_own_split(tmp_path):
    make_folder(tmp_path, ["cat"], split="test")
    config = DataConfig(source="image_folder", data_dir=str(tmp_path))
    assert len(open_source(config, train=False)) == 2


def test_tfds_records_keep_their_jpeg_bytes(toy_tfds):
    source = TfdsSource("toy", toy_tfds, "train")
    assert (len(source), source.num_classes, source.name) == (5, 3, "toy/1.0.0/train")
    assert source[4] == (jpeg((200, 0, 0)), 1)
    assert source.describe(4) == "toy/1.0.0/train record 4 (n4.JPEG)"
    assert len(TfdsSource("toy:1.0.0", toy_tfds, "train[:40%]")) == 2


def test_tfds_takes_the_newest_version(toy_tfds, tmp_path):
    data_dir = edited(toy_tfds, tmp_path)
    (tmp_path / "toy" / "1.0.0").rename(tmp_path / "toy" / "1.9.0")
    (edited_dir := tmp_path / "toy" / "1.10.0").mkdir()
    for file in (tmp_path / "toy" / "1.9.0").iterdir():
        (edited_dir / file.name).write_bytes(file.read_bytes().replace(b'"1.0.0"', b'"1.10.0"'))
    assert TfdsSource("toy", data_dir, "train").name == "toy/1.10.0/train"


def test_sources_survive_pickling(toy_tfds, tmp_path):
    for source in (
        DigitsSource("test"),
        ImageFolderSource(make_folder(tmp_path, ["a"]), "train"),
        TfdsSource("toy", toy_tfds, "train"),
    ):
        copy = pickle.loads(pickle.dumps(source))
        assert (copy.name, len(copy), copy.num_classes) == (source.name, len(source), source.num_classes)
        assert copy[1].label == source[1].label and np.array_equal(copy[1].image, source[1].image)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar10", "train", "'cifar10' .* toy.*tfds build cifar10 --data_dir="),
        ("imagenet2012", "train", "ILSVRC2012_img_train.tar .*ILSVRC2012_img_val.tar .*downloads/manual"),
        ("toy:2.0.0", "train", "2.0.0 of 'toy' .* 1.0.0"),
        ("toy", "test", "'test' .* train.*config.data.train_split"),
        ("toy", "train[:200%]", r"train\[:200%\]"),
    ],
)
def test_tfds_says_what_is_missing(toy_tfds, name, split, message):
    with pytest.raises(InputError, match=message):
        TfdsSource(name, toy_tfds, split)


def test_tfds_needs_an_existing_data_dir(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist.*tfds build toy"):
        TfdsSource("toy", tmp_path / "nowhere", "train")
    assert not (tmp_path / "nowhere").exists()


def test_tfrecord_gets_the_conversion_command(toy_tfds, tmp_path):
    data_dir = edited(toy_tfds, tmp_path, fileFormat="tfrecord")
    with pytest.raises(InputError, match="tfrecord.*convert_format ") as error:
        TfdsSource("toy", data_dir, "train")
    command = str(error.value).partition("convert_format ")[2]
    assert command == f"--dataset_version_dir={tmp_path}/toy/1.0.0 --out_file_format=array_record"
    from importlib.util import find_spec

    script = find_spec("tensorflow_datasets.scripts.convert_format")
    assert script is not None and script.origin is not None
    with open(script.origin) as file:
        text = file.read()
    assert "'dataset_version_dir'" in text and "'out_file_format'" in text


def test_dataset_converted_in_place_is_read(toy_tfds, tmp_path):
    data_dir = edited(toy_tfds, tmp_path, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
    assert len(TfdsSource("toy", data_dir, "train")) == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(
            (file, content)
            for file in ("dataset_info.json", "features.json")
            for content in ("", "{", "[]", "null", "[" * 10**5, b"\xff\xfe", None)
        ),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": 3}'),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": [3]}'),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": [{"name": "train"}]}'),
        ("dataset_info.json", '{"fileFormat": ["array_record"], "splits": []}'),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": [{"name": "train", "shardLengths": "x"}]}'),
        ("features.json", "{}"),
        ("features.json", '{"pythonClassName": "tensorflow_datasets.core.features.features_dict.Gone"}'),
        ("features.json", '{"pythonClassName": 3}'),
    ],
)
def test_damaged_tfds_files_are_one_line(toy_tfds, tmp_path, file, content):
    data_dir = edited(toy_tfds, tmp_path)
    path = tmp_path / "toy" / "1.0.0" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        TfdsSource("toy", data_dir, "train")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("how", ["pythonClassName", "python_class_name", "type", "text"])
def test_features_of_other_modules_are_not_imported(toy_tfds, tmp_path, monkeypatch, how):
    data_dir = edited(toy_tfds, tmp_path)
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "toy" / "1.0.0" / "features.json"
    content = json.loads(file.read_text())
    inner = {"pythonClassName" if how == "text" else how: "trap.Feature", "content": {}}
    if how == "text":
        name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        content = {
            "type": name,
            "proto_cls": "tensorflow_datasets.FeaturesDict",
            "content": json.dumps({"features": {"a": inner}}),
        }
    else:
        content["featuresDict"]["features"]["extra"] = inner
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="'trap.Feature'"):
        TfdsSource("toy", data_dir, "train")


def test_a_label_outside_the_classes_of_tfds_is_named(tmp_path):
    root = write_tfds(tmp_path, "toy", 3, {"train": [(jpeg("red"), 0), (jpeg("red"), 2)]})
    features = root / "toy" / "1.0.0" / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    source = TfdsSource("toy", root, "train")
    with pytest.raises(InputError, match="record 1 has the label 2, .* 2 classes"):
        with eval_batches(source, TFDS, img_size=8, batch_size=2) as batches:
            next(batches)


def test_missing_shards_are_named(toy_tfds, tmp_path):
    data_dir = edited(toy_tfds, tmp_path)
    (tmp_path / "toy" / "1.0.0" / SHARD).unlink()
    with pytest.raises(InputError, match=f"^1 .*: {SHARD}"):
        TfdsSource("toy", data_dir, "train")


def damaged(toy_tfds, tmp_path, place):
    """A copy of toy_tfds with one bit flipped, at byte `place` of the image of record 3."""
    shard = Path(edited(toy_tfds, tmp_path)) / "toy" / "1.0.0" / SHARD
    content = bytearray(shard.read_bytes())
    content[content.index(jpeg((150, 0, 0))) + place] ^= 1
    shard.write_bytes(content)
    return TfdsSource("toy", tmp_path, "train")


def test_a_damaged_record_leaves_its_neighbours_readable(toy_tfds, tmp_path):
    source = damaged(toy_tfds, tmp_path, place=100)
    for index in (0, 1, 2, 4):
        assert source[index].image == jpeg((50 * index, 0, 0))
    with pytest.raises(OSError, match="data hash mismatch"):
        source[3]
    assert source.describe(3) == f"toy/1.0.0/train record 3 (in {SHARD})"
    assert source.describe(4) == "toy/1.0.0/train record 4 (n4.JPEG)"
    assert source[4].label == 1


@pytest.mark.parametrize("place", [0, 250])
def test_a_damaged_record_is_named_counted_and_weighs_nothing(toy_tfds, tmp_path, caplog, place):
    source = damaged(toy_tfds, tmp_path, place)
    with caplog.at_level(logging.WARNING, "top_jax"), eval_batches(source, TFDS, img_size=8, batch_size=5) as batches:
        [batch] = batches
    assert batch["mask"].tolist() == [1, 1, 1, 0, 1] and batch["index"].tolist() == [0, 1, 2, 3, 4]
    assert not batch["image"][3].any() and batch["image"][4].any()
    assert list(batches.corrupt) == [3]
    [line] = [record.getMessage() for record in caplog.records]
    assert f"toy/1.0.0/train record 3 (in {SHARD}) (" in line and "mismatch" in line
    assert "\n" not in line


def test_a_damaged_record_can_stop_the_run(toy_tfds, tmp_path):
    source, config = damaged(toy_tfds, tmp_path, place=100), dataclasses.replace(TFDS, on_corrupt="raise")
    with (
        pytest.raises(InputError, match=rf"toy/1.0.0/train record 3 \(in {SHARD}\) \(.*mism") as error,
        train_batches(source, config, img_size=8, batch_size=5, seed=0) as batches,
    ):
        next(batches)
    assert "\n" not in str(error.value)


def test_of_a_file_cut_short_every_record_is_named(toy_tfds, tmp_path):
    shard = Path(edited(toy_tfds, tmp_path)) / "toy" / "1.0.0" / SHARD
    shard.write_bytes(shard.read_bytes()[:70_000])
    source = TfdsSource("toy", tmp_path, "train")
    with eval_batches(source, TFDS, img_size=8, batch_size=5) as batches:
        [batch] = batches
    assert not batch["mask"].any() and list(batches.corrupt) == [0, 1, 2, 3, 4]


def test_shards_of_a_slice_are_counted(toy_tfds):
    assert TfdsSource("toy", toy_tfds, "train[40%:]").describe(0) == "toy/1.0.0/train[40%:] record 0 (n2.JPEG)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "s3"}, "config.data.source='s3'.* digits, tfds, hf, image_folder, packed"),
        ({"source": "tfds"}, "config.data.name"),
        (
            {"source": "tfds", "name": "imagenet2012"},
            "--config.data.data_dir=DIR.*tfds build imagenet2012 --data_dir=DIR.*ILSVRC2012_img_train.tar",
        ),
        ({"source": "image_folder"}, "--config.data.data_dir=DIR.* DIR/<split>/<class>"),
    ],
)
def test_open_source_says_what_to_set(changes, message):
    with pytest.raises(InputError, match=message):
        open_source(dataclasses.replace(DataConfig(), **changes), train=True)


def test_open_source_chooses_the_split():
    config = DataConfig(train_split="test", eval_split="train")
    assert open_source(config, train=True).name == "digits/test"
    assert open_source(config, train=False).name == "digits/train"


def test_neither_import_nor_reading_loads_tensorflow(toy_tfds):
    program = (
        "import sys, top_jax.data as data\n"
        "assert not {'grain', 'sklearn', 'tensorflow_datasets'} & set(sys.modules), 'heavy import'\n"
        "from top_jax.config import DataConfig\n"
        f"config = DataConfig(source='tfds', name='toy', data_dir={str(toy_tfds)!r})\n"
        "source = data.open_source(config, train=True)\n"
        "batch = next(data.train_batches(source, config, img_size=8, batch_size=2, seed=0))\n"
        "assert batch['image'].shape == (2, 8, 8, 3)\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_real_imagenet_sample(shared):
    data_dir = str(shared / "data" / "tensorflow_datasets")
    config = DataConfig(source="tfds", name="imagenet2012:5.1.0", data_dir=data_dir, eval_split="validation")
    train, evaluation = (open_source(config, train=train) for train in (True, False))
    assert (len(train), len(evaluation), train.num_classes) == (160, 80, 1000)
    assert train.describe(3) == "imagenet2012/5.1.0/train record 3 (n01601694_water_ouzel.JPEG)"
    image = train[3].image
    assert isinstance(image, bytes) and image[:2] == b"\xff\xd8" and train[3].label == 20


def test_real_cifar10(shared):
    source = TfdsSource("cifar10", shared / "data" / "tensorflow_datasets", "test")
    assert len(source) == 10_000 and source.num_classes == 10
    labels = np.bincount([source[i].label for i in range(500)], minlength=10)
    assert labels.min() > 20


def test_one_bit_of_cifar10(shared, tmp_path):
    """Flipped in the middle of the test images, it costs one of them."""
    original = shared / "data" / "tensorflow_datasets" / "cifar10" / "3.0.2"
    copy = tmp_path / "cifar10" / "3.0.2"
    copy.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt", CIFAR10_TEST):
        shutil.copyfile(original / name, copy / name)
    size = (copy / CIFAR10_TEST).stat().st_size
    with open(copy / CIFAR10_TEST, "r+b") as file:
        file.seek(size // 2)
        [byte] = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    source, unreadable = TfdsSource("cifar10", tmp_path, "test[45%:55%]"), []
    for index in range(len(source)):
        try:
            source[index]
        except OSError:
            unreadable.append(index)
    [index] = unreadable
    assert source.describe(index).endswith(f"record {index} (in {CIFAR10_TEST})")
