"""The pipeline: the same stream for any number of workers, exact resume, every evaluation image once."""

import dataclasses
import errno
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import eval_batches, open_source, prefetch_to_device, rand_augment, train_batches, transforms
from top_jax.data.examples import ExampleReader
from top_jax.data.sources import DigitsSource, Record
from top_jax.data.transforms import decode
from top_jax.errors import InputError, RunError

CONFIG = DataConfig(source="image_folder", train_transform="shift_crop", shift=3, eval_crop=1.0, eval_split="train")
TRAIN = {"img_size": 8, "batch_size": 20, "seed": 5}
EVERYTHING = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, repeats=3)
STEPS = 2  # batches in an epoch of the 47 digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 47 real digits, so that seven are left over in every epoch."""
    root, digits = tmp_path_factory.mktemp("digits"), DigitsSource("train")
    for i in range(47):
        record = digits[i]
        folder = root / "train" / str(record.label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.image).save(folder / f"{i:02}.png")
    return open_source(dataclasses.replace(CONFIG, data_dir=str(root)), train=True)


@pytest.fixture
def broken_folder(tmp_path):
    """Twelve images of two classes; one of class a is cut short."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.jpg")
    broken = tmp_path / "train" / "a" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:1000])
    return DataConfig(source="image_folder", data_dir=str(tmp_path), eval_split="train")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def test_batches_have_the_promised_arrays(digits):
    [batch] = take(train_batches(digits, CONFIG, **TRAIN), 1)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((20, 8, 8, 3), "uint8"),
        "label": ((20,), "int32"),
        "mask": ((20,), "float32"),
        "index": ((20,), "int64"),
    }
    assert all(digits[int(i)].label == label for i, label in zip(batch["index"], batch["label"], strict=True))
    assert (batch["mask"] == 1).all()


def test_epochs_have_no_repeats_and_differ(digits):
    batches = take(train_batches(digits, CONFIG, **TRAIN), 2 * STEPS)
    first, second = (np.concatenate([b["index"] for b in part]) for part in (batches[:STEPS], batches[STEPS:]))
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 40
    assert (first != second).mean() > 0.8


def test_every_image_is_used_over_the_epochs(digits):
    seen = [b["index"] for b in take(train_batches(digits, CONFIG, **TRAIN), 10 * STEPS)]
    assert set(np.concatenate(seen).tolist()) == set(range(47))


def test_augmentation_differs_between_epochs_and_seeds(digits):
    batches = take(train_batches(digits, CONFIG, **TRAIN), 2 * STEPS)
    images = {}
    for batch in batches:
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            images.setdefault(index, []).append(image)
    twice = [pair for pair in images.values() if len(pair) == 2]
    assert len(twice) > 30
    assert np.mean([np.array_equal(*pair) for pair in twice]) < 0.15  # one of the 49 shifts twice
    [other] = take(train_batches(digits, CONFIG, **TRAIN | {"seed": 6}), 1)
    assert (other["index"] != batches[0]["index"]).any()


def test_without_augmentation_the_pixels_are_the_source(digits):
    plain = dataclasses.replace(CONFIG, shift=0)
    [batch] = take(train_batches(digits, plain, **TRAIN), 1)
    for index, image in zip(batch["index"], batch["image"], strict=True):
        np.testing.assert_array_equal(image, decode(digits[int(index)].image))


def test_crop_then_rand_augment_then_colour_jitter(digits, monkeypatch):
    """The operations run in this order, with one generator, and the mean colour as fill."""
    calls, rng = [], np.random.default_rng(0)

    def note(image, generator, *what):
        if generator is rng:  # a thread of an earlier test may still be ending its last batch
            calls.append(what)
        return image

    def rand(self, image, rng, fill):
        return note(image, rng, "rand", self, fill)

    monkeypatch.setattr(transforms, "shift_crop", lambda image, size, rng, shift: note(image, rng, "crop", size))
    monkeypatch.setattr(transforms, "color_jitter", lambda image, rng, strength: note(image, rng, "jitter", strength))
    monkeypatch.setattr(rand_augment.RandAugment, "__call__", rand)
    config = dataclasses.replace(CONFIG, mean=(0.5, 0.25, 0.1))
    augment = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    ExampleReader(digits, config, (8, 8), augment).random(0, rng)
    policy = rand_augment.parse("rand-m9-mstd0.5-inc1")
    assert calls == [("crop", (8, 8)), ("rand", policy, (128, 64, 26)), ("jitter", 0.4)]
    calls.clear()
    ExampleReader(digits, config, (8, 8)).random(0, rng)
    assert calls == [("crop", (8, 8))]


def test_a_mistaken_policy_is_refused_before_anything_is_read(digits):
    with pytest.raises(InputError, match="rand_augment='rand-m9-w0' .*'w0'"):
        train_batches(digits, CONFIG, augment=AugmentConfig(rand_augment="rand-m9-w0"), **TRAIN)


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_threads_do_not_change_the_stream(digits, num_threads):
    expected = take(train_batches(digits, CONFIG, **TRAIN), 5)
    config = dataclasses.replace(CONFIG, num_threads=num_threads)
    for a, b in zip(expected, take(train_batches(digits, config, **TRAIN), 5), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_worker_processes_give_the_same_stream_and_resume_exactly(digits):
    expected = take(train_batches(digits, CONFIG, augment=EVERYTHING, **TRAIN), 10)
    workers = dataclasses.replace(CONFIG, num_workers=2)
    with train_batches(digits, workers, augment=EVERYTHING, **TRAIN) as batches:
        batches.set_state({"batches": 3})
        for batch in expected[3:]:
            assert_same(batch, next(batches))
        assert batches.get_state() == {"batches": 10}
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_resume_is_exact_and_as_quick_late_as_early(digits):
    batches = train_batches(digits, CONFIG, augment=EVERYTHING, **TRAIN)
    head = list(itertools.islice(batches, 3))
    state = json.loads(json.dumps(batches.get_state()))
    tail = list(itertools.islice(batches, 5))
    resumed = train_batches(digits, CONFIG, augment=EVERYTHING, **TRAIN)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for batch in tail:
        assert_same(batch, next(resumed))
    resumed.set_state({"batches": 0})
    assert_same(head[0], next(resumed))
    resumed.set_state({"batches": 10**10})  # skipping them one by one would take for ever
    next(resumed)
    batches.close()
    resumed.close()


def test_evaluation_sees_every_image_once(digits):
    batches = eval_batches(digits, CONFIG, img_size=8, batch_size=20)
    assert len(batches) == 3
    whole = take(batches, None)
    assert {batch["image"].shape for batch in whole} == {(20, 8, 8, 3)}
    index, mask = (np.concatenate([batch[name] for batch in whole]) for name in ("index", "mask"))
    assert index.tolist() == [*range(47), *[-1] * 13] and mask.tolist() == [1] * 47 + [0] * 13
    for i, image in enumerate(np.concatenate([batch["image"] for batch in whole])[:47]):
        np.testing.assert_array_equal(image, decode(digits[i].image))


@pytest.mark.slow
def test_workers_keep_the_order_of_evaluation(digits):
    """Three batches for two workers: the end of the first worker could break the order."""
    config = dataclasses.replace(CONFIG, num_workers=2)
    index = [b["index"] for b in take(eval_batches(digits, config, img_size=8, batch_size=20), None)]
    assert np.concatenate(index).tolist() == [*range(47), *[-1] * 13]


def test_corrupt_image_is_named_counted_and_weighs_nothing(broken_folder, caplog):
    source = open_source(broken_folder, train=True)
    with caplog.at_level(logging.WARNING, "top_jax"):
        batches = train_batches(source, broken_folder, img_size=16, batch_size=6, seed=0)
        seen = take(batches, 8)
    for batch in seen:
        unreadable = batch["index"] == 3
        np.testing.assert_array_equal(batch["mask"], np.where(unreadable, 0, 1))
        assert not batch["image"][unreadable].any() and (batch["label"][unreadable] == 0).all()
    assert sum((batch["mask"] == 0).sum() for batch in seen) == 4
    [line] = [message for record in caplog.records if "unreadable" in (message := record.getMessage())]
    assert "3.jpg (" in line and "truncated" in line
    assert list(batches.corrupt) == [3]


def test_corrupt_image_in_evaluation_keeps_its_index(broken_folder, caplog):
    source = open_source(broken_folder, train=False)
    batches = eval_batches(source, broken_folder, img_size=16, batch_size=8)
    first, second = take(batches, None)
    assert first["index"].tolist() == list(range(8)) and first["mask"][3] == 0
    assert first["mask"].sum() + second["mask"].sum() == 11
    assert len(batches.corrupt) == 1 and "truncated" in caplog.text


def test_what_is_wrong_with_an_evaluation_image_is_said_once(broken_folder, caplog):
    turned = Image.Exif()
    turned[0x0112] = 8
    for name in ("4.jpg", "5.jpg"):
        Image.new("RGB", (40, 40)).save(f"{broken_folder.data_dir}/train/b/{name}", exif=turned)
    source = open_source(broken_folder, train=False)
    caplog.clear()
    for _ in range(3):
        batches = eval_batches(source, broken_folder, img_size=16, batch_size=8)
        assert set(take(batches, None)[0]) == {"image", "label", "mask", "index"}
        assert list(batches.corrupt) == [3]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "a/3.jpg" in messages[0] and "b/4.jpg has the EXIF orientation 8" in messages[1]
    followed = dataclasses.replace(broken_folder, exif_rotate=True)
    caplog.clear()
    take(eval_batches(open_source(followed, train=False), followed, img_size=16, batch_size=8), None)
    assert len(caplog.records) == 1  # the unreadable image


@pytest.mark.parametrize("first", [0, 3])
def test_training_stops_where_nothing_can_be_read(broken_folder, first):
    """At once, or because the data is gone after `first` batches."""
    config = dataclasses.replace(broken_folder, num_threads=0)
    source = open_source(config, train=True)
    with train_batches(source, config, img_size=16, batch_size=4, seed=0) as batches:
        for _ in range(first):
            next(batches)
        shutil.rmtree(f"{config.data_dir}/train")
        with pytest.raises(RunError if first else InputError, match="the last 12 .*/[ab]/[0-5].jpg"):
            for _ in range(8):
                next(batches)


class Labelled:
    """Images whose labels are in the records; with `labels`, the source holds them too."""

    name, num_classes, class_names = "toy/train", 3, ("a", "b", "c")

    def __init__(self, labels, hold):
        self._labels = labels
        if hold:
            self.labels = np.array(labels)

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return Record(np.zeros((8, 8, 3), np.uint8), self._labels[index])

    def describe(self, index):
        return f"record {index}"


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("wrong", [3, -1, 10**6])
def test_a_label_that_is_no_class_is_refused(hold, wrong):
    source = Labelled([0, 1, wrong, 2], hold)
    for make in (eval_batches, functools.partial(train_batches, seed=0)):
        with pytest.raises(InputError, match=f"record 2 has the label {wrong}, .* 3 classes"):
            take(make(source, CONFIG, img_size=8, batch_size=4), 1)


def test_a_split_without_images_is_refused():
    for make in (eval_batches, functools.partial(train_batches, seed=0)):
        with pytest.raises(InputError, match="toy/train"):
            make(Labelled([], True), CONFIG, img_size=8, batch_size=1)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search"), "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device"), "--shm-size"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search"), "killed.*num_workers=0"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code 1. Search"), "code 1.*num_workers=0"),
    ],
)
def test_the_end_of_a_worker_is_one_line(digits, raised, message):
    class Ended:
        def __next__(self):
            raise raised

        def close(self):
            pass

    with train_batches(digits, CONFIG, **TRAIN) as batches:
        batches._iterator = Ended()
        with pytest.raises(RunError, match=message):
            next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_can_stop_the_run(broken_folder, num_workers):
    config = dataclasses.replace(broken_folder, on_corrupt="raise", num_workers=num_workers)
    source = open_source(config, train=True)
    with pytest.raises(InputError, match=r"a/3.jpg \(.*truncated.*\)") as error:
        take(train_batches(source, config, img_size=16, batch_size=12, seed=0), 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "batch_size", "hosts", "message"),
    [
        ({}, 2000, 1, "train .* 47 .* batch_size=2000"),
        ({}, 9, 2, "batch_size=9 .* 2 host"),
        ({"train_transform": "cutmix"}, 9, 1, "config.data.train_transform='cutmix'.* random_resized_crop, shift_crop"),
        ({"eval_crop": 1e-9}, 9, 1, "config.data.eval_crop=1e-09 .* at most 32768"),
    ],
)
def test_impossible_settings_are_refused(digits, changes, batch_size, hosts, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match=message):
        train_batches(digits, config, img_size=8, batch_size=batch_size, seed=0, process_count=hosts)


@pytest.mark.parametrize("size", [0, 2])
def test_prefetch_yields_the_state_after_each_batch(digits, size):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    settings = TRAIN | {"batch_size": 8 * jax.device_count()}
    batches = train_batches(digits, CONFIG, **settings)
    expected = take(train_batches(digits, CONFIG, **settings), 6)
    moved = prefetch_to_device(batches, sharding, size)
    for count, (batch, (on_device, state)) in enumerate(zip(expected, moved, strict=False), start=1):
        assert state == {"batches": count}
        assert on_device["image"].sharding == sharding and on_device["index"].dtype == np.int32
        assert_same(batch, jax.device_get(on_device))
    assert batches.get_state()["batches"] >= 6 + size
    resumed = train_batches(digits, CONFIG, **settings)
    resumed.set_state({"batches": 3})
    assert_same(expected[3], next(resumed))
    batches.close()
    resumed.close()


def test_prefetch_ends_with_evaluation_and_passes_errors_on(broken_folder):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    source = open_source(broken_folder, train=False)
    masks = [
        b["mask"]
        for b, _ in prefetch_to_device(eval_batches(source, broken_folder, img_size=8, batch_size=5), sharding)
    ]
    assert [int(mask.sum()) for mask in masks] == [4, 5, 2]
    config = dataclasses.replace(broken_folder, on_corrupt="raise")
    with pytest.raises(InputError, match="a/3.jpg"):
        list(prefetch_to_device(eval_batches(source, config, img_size=8, batch_size=5), sharding))


def test_closing_ends_the_threads(digits):
    before = threading.active_count()
    take(train_batches(digits, CONFIG, **TRAIN), 3)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


PROGRAM = """
import os, sys, time
from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import open_source, train_batches

if __name__ == "__main__":
    config = DataConfig(num_workers=1)
    batches = train_batches(open_source(config, train=True), config, img_size=8, batch_size=32, seed=0)
    next(batches)
    import multiprocessing
    print(multiprocessing.active_children()[0].pid, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)

    def start(how):
        return subprocess.Popen(
            [sys.executable, str(path), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_program_that_never_closes_still_exits_cleanly(program):
    out, err = program("exit").communicate(timeout=60)
    assert err == "" and not is_running(int(out))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_workers_survive_a_signal_to_the_group_but_not_their_parent(program):
    parent = program("wait")
    worker = int(parent.stdout.readline())
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        time.sleep(0.5)
        assert is_running(worker)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(worker)
    finally:
        for pid in (parent.pid, worker):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        parent.communicate()


def test_real_imagenet_trains_and_evaluates(shared):
    config = DataConfig(
        source="tfds",
        name="imagenet2012",
        data_dir=str(shared / "data" / "tensorflow_datasets"),
        eval_split="validation",
    )
    [batch] = take(train_batches(open_source(config, train=True), config, img_size=224, batch_size=8, seed=0), 1)
    assert batch["image"].shape == (8, 224, 224, 3) and batch["mask"].all() and batch["image"].std() > 30
    seen = take(eval_batches(open_source(config, train=False), config, img_size=224, batch_size=32), None)
    assert np.concatenate([b["index"] for b in seen]).tolist() == [*range(80), *[-1] * 16]
    assert sum(b["mask"].sum() for b in seen) == 80
