"""One file for a whole dataset: the records are those of the original sources."""

import dataclasses
import errno
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from top_jax.config import DataConfig
from top_jax.data.pipeline import reader_of
from top_jax.data.sources import DigitsSource, PackedSource, Record, is_dense, open_source
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


def arrays(**changes):
    """The arrays of a packed file of two images."""
    return {
        "name": np.array("toy"),
        "classes": np.array(["a", "b"]),
        "train/images": np.frombuffer(b"abc", np.uint8),
        "train/ends": np.array([1, 3]),
        "train/labels": np.array([0, 1], np.int32),
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"train/ends": np.array([1, 4])},
        {"train/ends": np.array([3, 1])},
        {"train/ends": np.array([-1, 3])},
        {"train/ends": np.array([3])},
        {"train/ends": np.array([1.0, 3.0])},
        {"train/ends": np.array([[1, 3]])},
        {"train/labels": np.array([0, 2])},
        {"train/labels": np.array([-1, 0])},
        {"train/labels": np.array([0.0, 1.0])},
        {"train/labels": np.array(5)},
        {"train/images": np.zeros(3, np.float32)},
        {"train/images": np.zeros(0, np.uint8), "train/ends": np.zeros(0, int), "train/labels": np.zeros(0, int)},
        {"classes": np.array([1, 2])},
        {"classes": np.array("a")},
        {"classes": np.array([b"a", "b"], object)},
    ],
)
def test_contents_that_contradict_each_other_are_refused(tmp_path, changes):
    config = DataConfig(source="packed", data_dir=str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **arrays())
    assert open_source(config, train=True)[1] == Record(b"bc", 1)
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(InputError) as error:
        open_source(config, train=True)
    assert "\n" not in str(error.value)


def test_damage_is_one_line_or_harmless(tmp_path):
    """Flipped bits and cuts: an InputError, or the same records."""
    np.savez_compressed(tmp_path / "a.npz", **arrays())
    whole, rng, refused = (tmp_path / "a.npz").read_bytes(), np.random.default_rng(0), 0
    damaged = [whole[:cut] for cut in range(0, len(whole), 37)]
    for _ in range(150):
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.append(bytes(content))
    for content in damaged:
        (tmp_path / "b.npz").write_bytes(content)
        try:
            source = PackedSource(tmp_path / "b.npz", "train")
            assert [source[0], source[1]] == [Record(b"a", 0), Record(b"bc", 1)]
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_a_header_that_lies_about_a_size_is_refused(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    np.savez(tmp_path / "a.npz", **{name: x for name, x in arrays().items() if name != "train/images"})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("train/images.npy", file.getvalue() + b"abc")
    with pytest.raises(InputError, match="damaged"):
        PackedSource(tmp_path / "a.npz", "train")


def test_refuses(file, tmp_path):
    with pytest.raises(InputError, match=r"toy.npz .*'val'.* test, train"):
        PackedSource(file, "val")
    for missing in (tmp_path / "nowhere.npz", tmp_path):
        with pytest.raises(InputError, match=f"no packed dataset {missing}.*pack"):
            PackedSource(missing, "train")
    (tmp_path / "other.npz").write_bytes(b"something else")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npz", np.zeros(3))
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "kind.npz", weights=np.zeros(3))
    for name in ("other.npz", "empty.npz", "array.npz", "kind.npz"):
        with pytest.raises(InputError, match=name):
            PackedSource(tmp_path / name, "train")
    with pytest.raises(InputError, match="--config.data.data_dir=FILE.npz"):
        open_source(DataConfig(source="packed"), train=True)


LABEL_MAPS = DataConfig(source="digit_scenes", ignore_label=200)


def test_label_maps(tmp_path):
    """The batches of the packed file are those of the source."""
    path = tmp_path / "scenes.npz"
    source = open_source(LABEL_MAPS, train=False)
    few = [source[i] for i in range(4)]

    class Few(type(source)):
        def __len__(self):
            return len(few)

    pack(path, "scenes", {"test": Few("test")}, config=LABEL_MAPS)
    config = dataclasses.replace(LABEL_MAPS, source="packed", data_dir=str(path))
    packed = open_source(config, train=False)
    assert is_dense(packed) and (len(packed), packed.class_names) == (4, source.class_names)
    assert packed.label_size(1) == (64, 64) and "record 1" in packed.describe_labels(1)
    readers = [reader_of(one, config, (64, 64)) for one in (packed, source)]
    for index in range(4):
        assert all(np.array_equal(*pair) for pair in zip(*(one.pixels(index) for one in readers), strict=True))
    with pytest.raises(InputError, match="ignore_label=200.*255 here"):
        open_source(dataclasses.replace(config, ignore_label=255), train=False)
    with np.load(path) as file:
        contents = dict(file)
    np.savez(path, **contents | {"test/map_ends": contents["test/map_ends"][:3]})
    with pytest.raises(InputError, match="contradict"):
        open_source(config, train=False)


class Broken(Encoded):
    """A source whose second record cannot be read."""

    def __getitem__(self, index):
        if index:
            raise OSError("checksum")
        return self.records[index]


class Mislabelled(Encoded):
    """A source with a label that is no class."""

    records = (Record(b"a", 1), Record(b"b", 3))


def test_pack_writes_the_whole_file_or_none(file, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="toy.npz exists"):
        pack(file, "toy", {})
    with pytest.raises(InputError, match="no/toy.npz"):
        pack(tmp_path / "no" / "toy.npz", "toy", {"train": Broken()})
    with pytest.raises(InputError, match=r"record 1 \(checksum\)"):
        pack(tmp_path / "toy.npz", "toy", {"train": Broken()})
    with pytest.raises(InputError, match="record 1 has the label 3"):
        pack(tmp_path / "toy.npz", "toy", {"train": Mislabelled()})

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(InputError, match=r"toy.npz .*full"):
        pack(tmp_path / "toy.npz", "toy", {"train": Encoded()})
    assert not list(tmp_path.iterdir())
