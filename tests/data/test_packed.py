"""One file for a whole dataset: the records are those of the original sources."""

import io

import numpy as np
import pytest
from PIL import Image

from top_jax.config import DataConfig
from top_jax.data.sources import DigitsSource, PackedSource, Record, open_source
from top_jax.data.sources.packed import pack
from top_jax.errors import InputError


class Encoded:
    """Two images of different length, as bytes that need not be images."""

    name, num_classes, class_names = "toy/train", 3, ("a", "b", "c")
    records = (Record(b"\x00ab", 2), Record(b"\xff", 0))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def describe(self, index):
        return f"record {index}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path, seen = tmp_path_factory.mktemp("packed") / "toy.npz", []
    pack(path, "toy", {"train": Encoded(), "test": DigitsSource("test")}, on_images=seen.append)
    assert sum(seen) == 2 + 360
    return path


def test_bytes_stay_as_they_were(file):
    source = PackedSource(file, "train")
    assert (source.name, len(source)) == ("toy/train", 2)
    assert [source[0], source[1]] == list(Encoded.records)
    assert source.describe(1) == "toy/train record 1"


def test_pixels_become_png_and_lose_nothing(file):
    source, digits = open_source(DataConfig(source="packed", data_dir=str(file)), train=False), DigitsSource("test")
    assert (len(source), source.num_classes, source.class_names) == (360, 10, digits.class_names)
    for index in (0, 359):
        image, label = source[index]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), digits[index].image)
        assert label == digits[index].label


def test_refuses(file, tmp_path):
    with pytest.raises(InputError, match=r"toy.npz .*'val'.* test, train"):
        PackedSource(file, "val")
    with pytest.raises(InputError, match=r"nowhere.npz .*No such file.*cli.pack"):
        PackedSource(tmp_path / "nowhere.npz", "train")
    (tmp_path / "other.npz").write_bytes(b"something else")
    with pytest.raises(InputError, match="other.npz"):
        PackedSource(tmp_path / "other.npz", "train")
    with pytest.raises(InputError, match="toy.npz exists"):
        pack(file, "toy", {})
    with pytest.raises(InputError, match=r"no/toy.npz .*\(No such file"):
        pack(tmp_path / "no" / "toy.npz", "toy", {})
    with pytest.raises(InputError, match="--config.data.data_dir=FILE.npz"):
        open_source(DataConfig(source="packed"), train=True)
