"""The measurements of the loader, and the verdict on given numbers; no test depends on the clock."""

import os

import numpy as np
import pytest

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import loader_speed as speed
from top_jax.data.loader_speed import Lanes, verdict
from top_jax.data.sources import DigitsSource, Record

TWO = Lanes(cores=2, workers=0, threads=2)
RAND = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize(
    ("given", "needed", "bottleneck", "cores", "words"),
    [
        (
            310.0,
            3.4,
            False,
            1,
            "the loader gives 310 img/s (155 per core on 2 cores), the step takes 3.4 img/s: the loader is not the "
            "bottleneck (busy 1.1% of the time)",
        ),
        (310.0, 248.0, False, 2, "the loader is not the bottleneck (busy 80.0% of the time)"),
        (310.0, 300.0, False, 2, "the loader keeps up, with little to spare (busy 97% of the time)"),
        (310.0, 310.0, False, 2, "the loader keeps up, with little to spare (busy 100% of the time)"),
        (
            310.0,
            2000.0,
            True,
            13,
            "the step takes 2,000 img/s: the loader is the bottleneck. About 13 such cores would be enough, or "
            "smaller images on disk, or less augmentation on the host",
        ),
    ],
)
def test_verdict(given, needed, bottleneck, cores, words):
    found = verdict(given, needed, TWO)
    assert (found.bottleneck, found.cores_needed) == (bottleneck, cores)
    assert found.busy == pytest.approx(needed / given) and found.text.endswith(words)


@pytest.mark.parametrize(("needed", "workers"), [(1000.0, 7), (9000.0, 16)])
def test_verdict_where_cores_are_idle(needed, workers):
    """The first thing to do is to use them."""
    found = verdict(310.0, needed, Lanes(cores=16, workers=0, threads=2))
    assert "(155 per core on 2 cores of 16)" in found.text
    assert found.text.endswith(f"it uses 2 of 16: try --config.data.num_workers={workers}")


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "total", "used"),
    [(2, 0, 2, 2, 2), (8, 0, 2, 2, 2), (8, 4, 2, 8, 8), (8, 16, 2, 32, 8), (8, 0, 0, 1, 1), (8, 3, 0, 3, 3)],
)
def test_lanes(cores, workers, threads, total, used):
    at_work = Lanes(cores, workers, threads)
    assert (at_work.total, at_work.cores_used) == (total, used)


def test_lanes_of_a_config(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert speed.lanes(DataConfig(num_workers=4, num_threads=1)) == (3, 4, 1)


@pytest.mark.parametrize(
    ("configured", "images", "rate", "size"),
    [(128, 50_000, 8000.0, 128), (1024, 160, 8000.0, 160), (1024, 50_000, 100.0, 25), (1024, 50_000, 0.5, 1)],
)
def test_measuring_batch_size(configured, images, rate, size):
    assert speed.measuring_batch_size(configured, images=images, images_per_second=rate) == size


@pytest.mark.parametrize(("number", "text"), [(3.416, "3.42"), (0.33, "0.33"), (31.0, "31"), (2041.4, "2,041")])
def test_numbers(number, text):
    assert speed.number(number) == text


@pytest.mark.parametrize(
    ("augment", "last"),
    [
        (AugmentConfig(mixup=0.8, erasing=0.25), "read + decode + crop"),  # the device's
        (RAND, "read + decode + crop + augment"),
        (AugmentConfig(color_jitter=0.3), "read + decode + crop + augment"),
    ],
)
def test_stages_are_those_of_the_config(augment, last):
    assert list(speed.stages(DigitsSource("test"), DataConfig(), augment, (8, 8)))[-1] == last


class Counted:
    """Four images, the third of them unreadable; it notes what is read."""

    name, num_classes, class_names = "counted", 2, ("a", "b")

    def __init__(self):
        self.read = []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.read.append(index)
        if index == 2:
            raise OSError("gone")
        return Record(np.full((8, 8, 3), 50 * index, np.uint8), 0)

    def describe(self, index):
        return f"image {index}"


def test_every_stage_reads_its_image_and_survives_an_unreadable_one():
    source = Counted()
    config = DataConfig(on_corrupt="raise")
    for stage in speed.stages(source, config, RAND, (8, 8)).values():
        source.read.clear()
        for index in range(4):
            stage(index)
        assert source.read == [0, 1, 2, 3]


def test_augment_comes_after_crop():
    """The last stage changes pixels that the one before it leaves."""
    config = DataConfig(train_transform="shift_crop", shift=0, eval_crop=1.0)
    stages = speed.stages(Counted(), config, AugmentConfig(color_jitter=0.9), (8, 8))
    crop, augment = (stages[f"read + decode + crop{more}"](1)["image"] for more in ("", " + augment"))
    assert (crop == 50).all() and (augment != 50).any()


def test_a_stage_runs_over_different_images_in_random_order():
    """It runs until the time is over, at least once, from the given start."""

    def ticking(seen, times):
        def stage(index):
            seen.append(index)
            if len(seen) == times:
                raise StopIteration

        return stage

    seen, later, once = [], [], []
    for record, start in ((seen, 0), (later, 3)):
        with pytest.raises(StopIteration):
            speed.measure_stage(ticking(record, 20), 10, seconds=1e6, start=start)
    assert sorted(seen[:10]) == list(range(10)) and seen[:10] != list(range(10))
    assert seen[10:] == seen[:10] and later[:7] == seen[3:10]
    assert speed.measure_stage(once.append, 10, seconds=0.0).images == len(once) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_the_whole_pipeline_is_measured_in_rounds(threads):
    config = DataConfig(num_threads=threads)
    found, start = speed.measure_pipeline(DigitsSource("test"), config, RAND, (8, 8), batch_size=4, seconds=0.0)
    assert found.images == 4 * threads  # one batch of each thread
    assert found.images_per_second == found.images / found.seconds and start > 0
