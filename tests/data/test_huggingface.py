"""Hugging Face datasets as a source: every local form, and which columns are taken."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from top_jax.config import DataConfig
from top_jax.data import eval_batches, open_source, train_batches
from top_jax.data.sources import HuggingFaceSource, Source
from top_jax.errors import InputError

datasets = pytest.importorskip("datasets", reason="needs the package datasets (the `hf` extra)")
NAMES = ("cat", "dog")


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """No network, no bars, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield


def images(count):
    return [Image.fromarray(np.full((6, 8, 3), 40 * i, np.uint8)) for i in range(count)]


def table(count=6, **columns):
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    rows = {"img": images(count), "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict({**rows, **columns}, datasets.Features(features) if not columns else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same set in three forms."""
    root = tmp_path_factory.mktemp("hf")
    both = datasets.DatasetDict(train=table(), test=table(4))
    both.save_to_disk(root / "saved")
    for split, rows in both.items():
        (root / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(root / "parquet" / f"{split}-0.parquet")
        for index, image in enumerate(images(len(rows))):
            place = root / "images" / split / NAMES[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{index}.png")
    return root


@pytest.mark.parametrize(("name", "form"), [(None, "saved"), (None, "parquet"), ("imagefolder", "images")])
def test_every_form(folder, name, form):
    config = DataConfig(source="hf", name=name, data_dir=str(folder / form))
    source = open_source(config, train=True)
    assert isinstance(source, Source) and source.class_names == NAMES and source.num_classes == 2
    assert len(source) == 6 and len(open_source(config, train=False)) == 4
    assert np.bincount(source.labels).tolist() == [3, 3] and "record 1" in source.describe(1)
    again = pickle.loads(pickle.dumps(source))
    for index in range(6):
        record = source[index]
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        assert record.label == (pixels[0, 0, 0] // 40) % 2 == source.labels[index]
        assert again[index] == record


def test_batches_resume(folder):
    """The second batch of the second epoch, read at once or in turn."""
    source = HuggingFaceSource(None, folder / "saved", "train")
    with train_batches(source, DataConfig(), img_size=8, batch_size=3, seed=1) as batches:
        expected = [next(batches) for _ in range(4)][-1]
        batches.set_state({"batches": 3})
        jumped = next(batches)
    for name, values in expected.items():
        np.testing.assert_array_equal(jumped[name], values)
    with eval_batches(source, DataConfig(), img_size=8, batch_size=4) as batches:
        seen = [
            (int(label), int(index))
            for batch in batches
            for label, index in zip(batch["label"], batch["index"], strict=True)
        ]
    assert seen == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5), (0, -1), (0, -1)]


@pytest.mark.parametrize(
    ("labels", "expected", "numbers"),
    [(["b", "a", "b", "c"], ("a", "b", "c"), [1, 0, 1, 2]), ([7, 3, 7, 3], ("3", "7"), [1, 0, 1, 0])],
)
def test_labels_that_are_values(tmp_path, labels, expected, numbers):
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("string" if "a" in labels else "int64"))
    rows = datasets.Dataset.from_dict({"image": images(4), "labels": labels}, features)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path)
    source = HuggingFaceSource(None, tmp_path, "train")
    assert source.class_names == expected and source.labels.tolist() == numbers


def test_the_finer_of_two_label_columns(tmp_path, caplog):
    kinds = {name: datasets.ClassLabel(names=list(names)) for name, names in (("coarse", "ab"), ("fine", "xyz"))}
    features = datasets.Features(img=datasets.Image(), **kinds)
    rows = datasets.Dataset.from_dict({"img": images(2), "coarse": [0, 1], "fine": [2, 1]}, features)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path)
    source = HuggingFaceSource(None, tmp_path, "train")
    assert source.class_names == ("x", "y", "z") and "coarse, fine; taking fine" in caplog.text


def test_what_cannot_be_opened(folder, tmp_path):
    features = datasets.Features(img=datasets.Image(), text=datasets.Value("string"))
    rows = datasets.Dataset.from_dict({"img": images(1), "text": ["a"]}, features)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "no_label")
    datasets.DatasetDict(train=rows.remove_columns("img")).save_to_disk(tmp_path / "no_image")
    for arguments, message in (
        ((None, None, "train"), "config.data.name"),
        ((None, tmp_path / "nowhere", "train"), "nowhere does not exist"),
        ((None, folder / "saved", "val"), "no split 'val'.*train, test"),
        ((None, folder / "parquet", "val"), "parquet/val"),
        ((None, tmp_path, "train"), "datasets cannot open"),
        (("nobody/nothing", None, "train"), "nobody/nothing"),
        ((None, tmp_path / "no_label", "train"), "no label column.*text"),
        ((None, tmp_path / "no_image", "train"), "0 image columns.*text"),
    ):
        with pytest.raises(InputError, match=message):
            HuggingFaceSource(*arguments)
