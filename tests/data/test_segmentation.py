"""Images with a label of each pixel: sources, training and evaluation batches, and bad input."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from top_jax.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from top_jax.data import (
    IGNORED,
    eval_batches,
    infer,
    is_dense,
    open_source,
    prefetch_to_device,
    prepare_image,
    train_batches,
)
from top_jax.data.inspection import inspect_split
from top_jax.data.loader_speed import stages
from top_jax.data.pipeline import reader_of
from top_jax.data.sources import segmentation_folder
from top_jax.errors import InputError

SCENES = DataConfig(source="digit_scenes", scale=(64, 64), scale_range=(0.75, 1.5), max_class_share=1.0)
SEGMENTER = ModelConfig(head="uper")
PLAIN = AugmentConfig(flip=False)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_said():
    """Each test sees the warnings that are given once a process."""
    segmentation_folder._noted.clear()


@pytest.fixture(scope="module")
def scenes():
    return open_source(SCENES, train=True)


def save(path, array, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **settings)


def folder(root, sizes=((20, 30),) * 6, classes="sky\nground\n"):
    """Photographs image0.png ... of noise, with label maps of 0 and 1, as one folder without splits."""
    for i, (height, width) in enumerate(sizes):
        save(root / "images" / f"image{i}.png", RNG.integers(0, 256, (height, width, 3)).astype(np.uint8))
        save(root / "annotations" / f"image{i}.png", RNG.integers(0, 2, (height, width)).astype(np.uint8))
    if classes:
        (root / "classes.txt").write_text(classes)
    return DataConfig(source="segmentation_folder", data_dir=str(root), eval_share=0.2, scale=(64, 32))


def one_pass(config, size=512, train=True):
    """Returns the one evaluation batch of each size."""
    with eval_batches(open_source(config, train=train), config, img_size=size, batch_size=8) as batches:
        return list(batches)


def run(**settings):
    return RunConfig(model=SEGMENTER, optimizer=OptimizerConfig(label_smoothing=0.0), **settings)


class TestDigitScenes:
    def test_what_they_are(self, scenes):
        assert is_dense(scenes) and not is_dense(open_source(DataConfig(), train=True))
        assert (len(scenes), len(open_source(SCENES, train=False)), scenes.num_classes) == (1437, 360, 11)
        digits = open_source(DataConfig(), train=True)
        for index in range(40):
            image, labels = scenes[index]
            assert image.shape == (64, 64, 3) and labels.shape == (64, 64)
            assert set(np.unique(labels)) <= {*range(11), IGNORED}
            assert digits.labels[index] + 1 in labels  # its own digit

    def test_the_same_in_every_process(self, scenes):
        again = pickle.loads(pickle.dumps(open_source(SCENES, train=True)))
        for index in (7, 3):
            assert all(np.array_equal(*pair) for pair in zip(scenes[index], again[index], strict=True))

    def test_the_split_of_the_digits(self):
        with pytest.raises(InputError, match="'val'.*train, test"):
            open_source(dataclasses.replace(SCENES, train_split="val"), train=True)


class TestTraining:
    def test_batches(self, scenes):
        with train_batches(scenes, SCENES, img_size=(48, 64), batch_size=4, seed=0) as batches:
            batch = next(batches)
        assert {name: (values.dtype, values.shape) for name, values in batch.items()} == {
            "image": (np.float32, (4, 48, 64, 3)),
            "label": (np.uint8, (4, 48, 64)),
            "mask": (np.float32, (4,)),
            "index": (np.int64, (4,)),
        }
        assert batch["mask"].all()

    @pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_resumes_exactly(self, scenes, workers):
        config = dataclasses.replace(SCENES, num_workers=workers, max_class_share=0.75)
        augment = AugmentConfig(photometric=True)

        def start():
            return train_batches(scenes, config, augment=augment, img_size=32, batch_size=3, seed=5)

        with start() as batches:
            taken = [next(batches) for _ in range(4)]
            states = batches.get_state()
            last = next(batches)
        with start() as batches:
            batches.set_state(states)
            again = next(batches)
        assert all(np.array_equal(last[name], again[name]) for name in last)
        assert not np.array_equal(taken[0]["image"], last["image"])

    def test_hosts_share_the_batch(self, scenes):
        def draw(**host):
            with train_batches(scenes, SCENES, img_size=16, batch_size=4, seed=1, **host) as batches:
                return next(batches)

        whole, parts = draw(), [draw(process_index=i, process_count=2) for i in range(2)]
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))

    def test_padding_comes_after_normalising(self, scenes):
        config = dataclasses.replace(SCENES, scale_range=(0.5, 0.5))
        example = reader_of(scenes, config, (40, 36), PLAIN).random(0, np.random.default_rng(0))
        image, label = example["image"], example["label"]
        assert image.shape == (40, 36, 3) and image[:32, :32].all(axis=-1).mean() > 0.9
        assert not image[32:].any() and not image[:, 32:].any()
        assert (label[32:] == IGNORED).all() and (label[:, 32:] == IGNORED).all()

    def test_image_and_label_are_flipped_together(self, scenes):
        config = dataclasses.replace(SCENES, scale_range=(1.0, 1.0))
        reader = reader_of(scenes, config, (64, 64), AugmentConfig())
        image, label = reader.pixels(0)
        drawn = [reader.random(0, np.random.default_rng(i)) for i in range(12)]
        flipped = [example for example in drawn if np.array_equal(example["label"], label[:, ::-1])]
        assert 0 < len(flipped) < 12
        for example in drawn:
            whole = image[:, ::-1] if any(example is one for one in flipped) else image
            expected = (whole / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
            np.testing.assert_allclose(example["image"], expected, atol=1e-5)

    def test_settings_of_classifiers(self, scenes):
        with pytest.raises(InputError, match="config.augment.mixup=0.8"):
            train_batches(scenes, SCENES, augment=AugmentConfig(mixup=0.8), img_size=16, batch_size=2, seed=0)


class TestEvaluation:
    def test_every_image_once_by_size(self, tmp_path):
        sizes = [(20, 30), (30, 20), (20, 30), (40, 60), (20, 30), (30, 20)]
        config = dataclasses.replace(folder(tmp_path / "a", sizes), eval_share=0.01, size_divisor=8)
        source = open_source(config, train=True)
        with eval_batches(source, config, img_size=64, batch_size=2, rows_multiple=2) as batches:
            found = list(batches)
        shapes = [batch["label"].shape[1:] for batch in found]
        assert shapes == sorted(shapes, key=lambda size: -size[0] * size[1]) and len(batches) == len(found)
        seen = np.concatenate([batch["index"] for batch in found])
        assert sorted(seen[seen >= 0]) == list(range(5))
        for batch in found:
            height, width = batch["label"].shape[1:]
            assert batch["image"].shape[:3] == (2, 32, 48) if height < width else (2, 48, 32)
            np.testing.assert_array_equal(batch["mask"], batch["index"] >= 0)
            assert (batch["label"][batch["mask"] == 0] == IGNORED).all()
            for row in np.flatnonzero(batch["mask"]):
                pixels, classes = reader_of(source, config, (64, 64)).pixels(int(batch["index"][row]))
                np.testing.assert_array_equal(batch["label"][row], classes)
                np.testing.assert_array_equal(batch["image"][row], prepare_image(pixels, config))

    def test_large_images_come_in_smaller_batches(self, scenes):
        reader = reader_of(scenes, SCENES, (64, 64))
        assert {len(part["indices"]) for part in reader.plan(8, 1)} == {8, 1437 % 8}
        reader = reader_of(scenes, SCENES, (16, 16))  # a scene has 16 times the pixels of this crop
        assert {len(part["indices"]) for part in reader.plan(32, 2)} == {4, 2}
        assert {len(part["indices"]) for part in reader.plan(8, 4)} == {4}

    def test_hosts_share_each_batch(self, scenes):
        source = open_source(SCENES, train=False)
        parts = [
            [batch["index"] for batch in eval_batches(source, SCENES, img_size=64, batch_size=100, **host)]
            for host in ({"process_index": i, "process_count": 2} for i in range(2))
        ]
        whole = np.concatenate([np.concatenate(rows) for rows in zip(*parts, strict=True)])
        assert sorted(whole) == list(range(360))
        assert [len(rows) for rows in parts[0]] == [len(rows) for rows in parts[1]] == [50, 50, 50, 30]

    def test_on_the_device(self):
        with eval_batches(open_source(SCENES, train=False), SCENES, img_size=64, batch_size=200) as batches:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shapes = [batch["image"].shape for batch, _ in prefetch_to_device(batches, sharding, 1)]
        assert shapes == [(200, 64, 64, 3), (160, 64, 64, 3)]


class TestFolder:
    def test_parts(self, tmp_path):
        config = folder(tmp_path)
        train, evaluation = (open_source(config, train=train) for train in (True, False))
        assert (len(train), len(evaluation), train.class_names) == (5, 1, ("sky", "ground"))
        assert len({source.describe(i) for source in (train, evaluation) for i in range(len(source))}) == 6
        assert train.label_size(0) == (20, 30)

    def test_splits(self, tmp_path):
        for split, sizes in (("train", [(9, 8)] * 3), ("val", [(8, 9)])):
            folder(tmp_path / split, sizes)
            for kind in ("images", "annotations"):
                (tmp_path / kind).mkdir(exist_ok=True)
                shutil.move(tmp_path / split / kind, tmp_path / kind / split)
        config = DataConfig(source="segmentation_folder", data_dir=str(tmp_path), eval_split="val", num_classes=2)
        assert [len(open_source(config, train=train)) for train in (True, False)] == [3, 1]
        assert open_source(config, train=True).class_names == ("class 0", "class 1")
        config = run(batch_size=16, data=dataclasses.replace(config, infer=True, num_classes=None))
        found = infer(config)
        assert (found.data.train_split, found.data.eval_split, found.data.eval_share) == ("train", "val", None)
        assert (found.model.num_classes, found.data.num_classes, found.batch_size, found.data.infer) == (2, 2, 2, False)
        assert infer(found) is found

    def test_infer_without_splits(self, tmp_path):
        data = dataclasses.replace(folder(tmp_path), infer=True, eval_share=None)
        found = infer(run(batch_size=4, data=data))
        assert (found.data.eval_share, found.model.num_classes, found.batch_size) == (0.2, 2, 2)
        assert len(open_source(found.data, train=True)) == 5
        with pytest.raises(InputError, match="num_classes=7.* 2 classes"):
            infer(dataclasses.replace(run(data=data), model=dataclasses.replace(SEGMENTER, num_classes=7)))

    def test_images_without_labels_are_named_and_counted(self, tmp_path, caplog):
        config = folder(tmp_path)
        for i in (1, 4):
            (tmp_path / "annotations" / f"image{i}.png").unlink()
        (tmp_path / "images" / "image2.png").unlink()
        source = open_source(config, train=True)
        open_source(config, train=False)
        [warning] = caplog.records
        for part in (
            "2 labelled images",
            "2 images without",
            "image1.png, image4.png",
            "1 label map without",
            "image2.png",
        ):
            assert part in warning.getMessage()
        assert len(source) == 2

    def test_two_images_of_one_label_map(self, tmp_path):
        config = folder(tmp_path)
        save(tmp_path / "images" / "image3.jpg", np.zeros((20, 30, 3), np.uint8))
        with pytest.raises(InputError, match="image3.jpg and image3.png.*annotations.image3.png"):
            open_source(config, train=True)

    def test_sizes_by_header(self, tmp_path):
        """Wrong sizes are found before a run; an EXIF turn that is followed, and a damaged file, pass."""
        config = folder(tmp_path)
        check = lambda **data: reader_of(source, dataclasses.replace(config, **data), (8, 8)).check_sizes()  # noqa: E731
        source = open_source(config, train=True)
        check()
        file = next(source.describe(i) for i in range(len(source)))
        exif = Image.Exif()
        exif[0x0112] = 6
        save(Path(file), np.zeros((30, 20, 3), np.uint8), exif=exif)
        check(exif_rotate=True)
        with pytest.raises(InputError, match="20 x 30 pixels.*30 x 20.*exif_rotate"):
            check()
        Path(file).write_bytes(b"")
        check()

    def test_all_pixels_ignored(self, tmp_path):
        config = folder(tmp_path)
        for i in range(6):
            save(tmp_path / "annotations" / f"image{i}.png", np.full((20, 30), 255, np.uint8))
        with train_batches(open_source(config, train=True), config, img_size=64, batch_size=2, seed=0) as batches:
            batch = next(batches)
        assert (batch["label"] == IGNORED).all() and batch["mask"].all() and np.isfinite(batch["image"]).all()

    @pytest.mark.parametrize("part", ["images", "annotations"])
    def test_damaged_files_are_skipped_and_named(self, tmp_path, part):
        config = folder(tmp_path)
        for i in range(6):
            file = tmp_path / part / f"image{i}.png"
            file.write_bytes(file.read_bytes()[:60])
        source = open_source(config, train=True)
        with eval_batches(source, config, img_size=64, batch_size=5) as batches:
            [batch] = list(batches)
        assert not batch["mask"].any() and len(batches.corrupt) == 5
        assert all(f"{part}/image" in line.replace("\\", "/") for line in batches.corrupt.values())
        with pytest.raises(InputError, match=f"{part}.image"):
            reader_of(source, config, (8, 8)).pixels(0)


def grey16(path):
    Image.fromarray(np.ones((20, 30), np.uint16)).save(path)


def palette(path):
    image = Image.fromarray(np.ones((20, 30), np.uint8), mode=None).convert("P")
    image.save(path)


BAD_LABELS = {
    "another size": (lambda path: save(path, np.zeros((20, 31), np.uint8)), "30 x 20.*31 x 20"),
    "no class": (lambda path: save(path, np.full((20, 30), 9, np.uint8)), "value 9 in 600 pixels.*0 to 1"),
    "palette": (palette, "palette"),
    "16 bits": (grey16, "16-bit"),
    "colours": (lambda path: save(path, np.zeros((20, 30, 3), np.uint8)), "RGB.*instance"),
    "one bit": (lambda path: save(path, np.zeros((20, 30), bool)), "1-bit"),
    "a JPEG": (lambda path: save(path, np.zeros((20, 30), np.uint8), format="JPEG"), "is no PNG"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_label_map_that_cannot_serve(tmp_path, case):
    make, message = BAD_LABELS[case]
    config = folder(tmp_path)
    path = tmp_path / "annotations" / "image3.png"
    make(path)
    config = dataclasses.replace(config, eval_share=0.01)
    train = dict.fromkeys((True, False), message)
    for part in train:  # whichever part the image falls into
        try:
            source = open_source(config, train=part)
        except InputError as error:
            assert "image3.png" in str(error)
            break
        if any("image3" in source.describe(i) for i in range(len(source))):
            with pytest.raises(InputError, match=f"(?s)image3.png.*{message}"):
                one_pass(config, train=part)
            break
    else:
        pytest.fail("no part has the image")


BAD_FOLDERS = {
    "no folder": (lambda root: shutil.rmtree(root), {}, "does not exist"),
    "no annotations": (lambda root: shutil.rmtree(root / "annotations"), {}, "annotations.*which holds images"),
    "no pairs": (lambda root: [file.unlink() for file in (root / "annotations").iterdir()], {}, "image0.png has none"),
    "no split": (lambda root: None, {"eval_share": None}, "'train'.*eval_share"),
    "no classes": (lambda root: (root / "classes.txt").unlink(), {}, "num_classes=N"),
    "a class twice": (lambda root: (root / "classes.txt").write_text("sky\nsea\nsky\n"), {}, "line 3.*of line 1"),
    "a class without name": (lambda root: (root / "classes.txt").write_text("sky\n\nsea\n"), {}, "line 2.*is empty"),
    "UTF-16": (lambda root: (root / "classes.txt").write_text("sky\nsea\n", "utf-16"), {}, "saved as UTF-8"),
    "other classes": (lambda root: None, {"num_classes": 3}, "2 classes.*num_classes=3"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_of_another_layout(tmp_path, case):
    change, settings, message = BAD_FOLDERS[case]
    config = folder(tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        open_source(dataclasses.replace(config, **settings), train=True)


def test_what_doctor_reports(tmp_path):
    config = dataclasses.replace(folder(tmp_path, classes="sky\nground\nwater\n"), eval_share=0.01)
    source = open_source(config, train=True)
    names = [tmp_path / "annotations" / f"{stem}.png" for stem in source.stems()]
    save(names[0], np.full((20, 30), 255, np.uint8))
    save(names[1], np.full((20, 30), 7, np.uint8))
    save(names[2], np.zeros((21, 30), np.uint8))
    names[3].write_bytes(names[3].read_bytes()[:50])
    found = inspect_split(source, config=config)
    assert (found.labels_read, found.smallest_class, found.largest_class, found.classes_without_images) == (3, 0, 2, 1)
    assert found.ignored == pytest.approx(600 / (600 + 630 + 600))
    assert all(names[i].name in line for i, line in zip((1, 2), found.refused, strict=True))
    [line] = found.unreadable
    assert names[3].name in line
    assert (found.decoded, found.shorter_side) == (5, (20, 20, 20))


def test_stages_of_the_loader(scenes):
    found = stages(scenes, SCENES, AugmentConfig(photometric=True), (32, 32))
    assert len(found) == 3
    for stage in found.values():
        stage(0)


class TestAde20k:
    CONFIG = DataConfig(source="ade20k", train_split="training", eval_split="validation", reduce_zero_label=True)

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "ADEChallengeData2016"
        for split, prefix, count in (("training", "train", 3), ("validation", "val", 2)):
            for i in range(1, count + 1):
                name = f"{split}/ADE_{prefix}_{i:08d}"
                save(root / "images" / f"{name}.jpg", RNG.integers(0, 256, (24, 32, 3)).astype(np.uint8))
                save(root / "annotations" / f"{name}.png", RNG.integers(0, 151, (24, 32)).astype(np.uint8))
        rows = "".join(f"{i}\t0.1\t5\t1\t0\tname {i}, other name\n" for i in range(1, 151))
        (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tStuff\tName\n{rows}")
        return root

    def config(self, root, **settings):
        return dataclasses.replace(self.CONFIG, data_dir=str(root), **settings)

    def test_the_official_layout(self, root, caplog):
        for data_dir in (root, root.parent):
            source = open_source(self.config(data_dir), train=True)
            assert (len(source), source.num_classes, source.class_names[149]) == (3, 150, "name 150")
        [warning] = caplog.records  # a copy of 3 images is none of ADE20K
        for part in ("3 labelled images", "20,210", "ADE_train_00000004"):
            assert part in warning.getMessage()
        [batch] = one_pass(self.config(root), train=False)
        stored = np.asarray(Image.open(root / "annotations/validation/ADE_val_00000001.png"))
        np.testing.assert_array_equal(batch["label"][0], np.where(stored == 0, IGNORED, stored - 1))
        assert batch["image"].shape[1:] == (512, 683, 3)

    def test_a_label_above_150(self, root):
        file = root / "annotations/validation/ADE_val_00000002.png"
        save(file, np.full((24, 32), 151, np.uint8))
        with pytest.raises(InputError, match="(?s)ADE_val_00000002.png.*value 151.*1 to 150"):
            one_pass(self.config(root), train=False)

    @pytest.mark.parametrize(
        ("present", "message"),
        [
            ("annotations_instance", "instance annotations"),
            ("scene_parse150", "instance challenge"),
            ("ADE20K_2021_17_01", "full ADE20K"),
            ("photographs", "there is photographs"),
        ],
    )
    def test_another_folder(self, tmp_path, present, message):
        (tmp_path / present).mkdir()
        with pytest.raises(InputError, match=message):
            open_source(self.config(tmp_path), train=True)

    def test_settings(self, root):
        for settings, message in (
            ({"reduce_zero_label": False}, "reduce_zero_label=True"),
            ({"train_split": "train"}, "train_split=training"),
        ):
            with pytest.raises(InputError, match=message):
                open_source(self.config(root, **settings), train=True)
        (root / "objectInfo150.txt").write_text("1\t0.1\t5\t1\t0\twall\n")
        with pytest.raises(InputError, match="1 classes instead of 150"):
            open_source(self.config(root), train=True)

    def test_tfds_is_refused(self):
        with pytest.raises(InputError, match="scene_parse150.*source=ade20k"):
            open_source(DataConfig(source="tfds", name="scene_parse150:1.0.0", data_dir="x"), train=True)


@pytest.mark.parametrize("source", ["digits", "digit_scenes"])
def test_a_folder_for_bundled_data(source, tmp_path):
    """The folder would be ignored, and its numbers taken for those of the bundled data."""
    with pytest.raises(InputError, match=f"data_dir=.*no effect.*{source}"):
        open_source(DataConfig(source=source, data_dir=str(tmp_path)), train=False)
