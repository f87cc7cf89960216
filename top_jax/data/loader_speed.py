"""Measures how many images per second this machine reads, decodes and augments, by stage and as a pipeline."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import transforms
from top_jax.data.pipeline import available_cores, reader_of, train_batches, worker_count
from top_jax.data.segmentation import SegmentationReader
from top_jax.data.sources import Source
from top_jax.values import counted

BATCH_SECONDS: Final = 0.25  # work of one core per batch, so that a measurement of seconds has enough batches
LITTLE_TO_SPARE: Final = 0.8  # busy share of the time, from which on the loader has little to spare
PLAIN: Final = AugmentConfig()


class Speed(NamedTuple):
    """Number of images counted, and the time they took."""

    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns counts and rate as JSON values."""
        return {**self._asdict(), "images_per_second": self.images_per_second}


class Lanes(NamedTuple):
    """The threads that decode: in worker processes, or in the training process if `workers` is 0."""

    cores: int  # available to this process
    workers: int
    threads: int  # per worker

    @property
    def total(self) -> int:
        """Largest number of batches in progress at a time."""
        return max(1, self.workers) * max(1, self.threads)

    @property
    def cores_used(self) -> int:
        """Number of cores that the threads can keep busy."""
        return min(self.cores, self.total)


def lanes(config: DataConfig) -> Lanes:
    """Returns the threads that a run with this config decodes with on this machine."""
    return Lanes(available_cores(), worker_count(config.num_workers), config.num_threads)


def stages(
    source: Source, config: DataConfig, augment: AugmentConfig, size: transforms.Size
) -> dict[str, Callable[[int], Any]]:
    """Returns the host's stages for an image, by name; each is a function of the index and includes those before it.

    The last stage is left out if the host does nothing after the crop.
    """

    def read_and_decode(index: int) -> None:
        try:
            transforms.decode(source[index].image, **config.decoding())
            if isinstance(reader, SegmentationReader):
                reader.classes(index)
        except transforms.DECODE_ERRORS:
            pass  # its time counts; the inspection names the image

    config = dataclasses.replace(config, on_corrupt="skip")
    reader = reader_of(source, config, size)
    found = {"read + decode": read_and_decode, "read + decode + crop": _training(source, config, PLAIN, size)}
    if augment.rand_augment is not None or augment.color_jitter or augment.photometric:
        found["read + decode + crop + augment"] = _training(source, config, augment, size)
    return found


def measure_stage(stage: Callable[[int], Any], images: int, *, seconds: float, start: int = 0) -> Speed:
    """Runs a stage in this thread, over images in random order as in training, repeatedly if there are too few.

    Args:
        stage: a function of an index.
        images: number of images in the split.
        seconds: no image is started after this time; at least one is measured.
        start: index in the random order to start from. Recently read files come from memory, so each stage should
            start where the last one ended.
    """
    order = np.random.default_rng(0).permutation(images)
    begun, count, spent = time.perf_counter(), 0, 0.0
    while not count or spent < seconds:
        stage(int(order[(start + count) % images]))
        count += 1
        spent = time.perf_counter() - begun
    return Speed(count, spent)


def measuring_batch_size(configured: int, *, images: int, images_per_second: float) -> int:
    """Returns the run's batch size, or the number of images that one core makes in 0.25 s if that is smaller."""
    return max(1, min(configured, images, int(images_per_second * BATCH_SECONDS)))


def measure_pipeline(
    source: Source,
    config: DataConfig,
    augment: AugmentConfig,
    size: transforms.Size,
    *,
    batch_size: int,
    seconds: float,
) -> tuple[Speed, float]:
    """Draws training batches as fast as possible, with the run's worker processes and threads.

    As a warm-up, all batches are drawn that may have been prepared while the workers were starting.

    Args:
        source: the training images.
        config: the run's.
        augment: the run's.
        size: (height, width) of the model's input, in pixels.
        batch_size: at most the number of images.
        seconds: no round (one batch from every thread) is started after this time; at least one is measured.

    Returns:
        The speed after the warm-up, and the seconds until the first batch, with the start of the worker processes.
    """
    at_work = lanes(config)
    config = dataclasses.replace(config, on_corrupt="skip")
    with train_batches(source, config, augment=augment, img_size=size, batch_size=batch_size, seed=0) as batches:
        begun = time.perf_counter()
        next(batches)
        start_seconds = time.perf_counter() - begun
        for _ in range(at_work.total + 2 * at_work.workers):  # what threads and the queues of worker processes hold
            next(batches)
        begun, drawn, spent = time.perf_counter(), 0, 0.0
        while not drawn or spent < seconds:
            for _ in range(at_work.total):
                next(batches)
            drawn += at_work.total
            spent = time.perf_counter() - begun
    return Speed(drawn * batch_size, spent), start_seconds


class Verdict(NamedTuple):
    """Whether the loader is fast enough for the training step.

    Attributes:
        bottleneck: the loader is slower than the step.
        busy: share of the time that the loader must work to feed the step; above 1 if it cannot.
        cores_needed: number of cores that would feed the step, at the measured rate per core.
        text: the verdict in words.
    """

    bottleneck: bool
    busy: float
    cores_needed: int
    text: str


def verdict(given: float, needed: float, at_work: Lanes) -> Verdict:
    """Compares the loader with the training step.

    Args:
        given: images per second of the whole pipeline.
        needed: images per second that the step takes, over all devices.
        at_work: the threads that the pipeline decodes with.
    """
    per_core, busy = given / at_work.cores_used, needed / given
    cores_needed = math.ceil(needed / per_core)
    rates = f"{loader_rate(given, at_work)}, the step takes {number(needed)} img/s"
    if busy <= LITTLE_TO_SPARE:
        text = f"{rates}: the loader is not the bottleneck (busy {busy:.1%} of the time)"
    elif busy <= 1:
        text = f"{rates}: the loader keeps up, with little to spare (busy {busy:.0%} of the time)"
    else:
        text = f"{rates}: the loader is the bottleneck. {_remedy(cores_needed, at_work)}"
    return Verdict(busy > 1, busy, cores_needed, text)


def loader_rate(given: float, at_work: Lanes) -> str:
    """Returns the pipeline's rate as text."""
    used = at_work.cores_used
    cores = counted(used, "core")
    of_all = "" if used == at_work.cores else f" of {at_work.cores}"
    return f"the loader gives {number(given)} img/s ({number(given / used)} per core on {cores}{of_all})"


def number(rate: float) -> str:
    """Formats a rate with three digits, or as a whole number from 100 on: 3.42, 31, 2,041."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _remedy(cores_needed: int, at_work: Lanes) -> str:
    cores = f"About {cores_needed} such cores would be enough"
    if at_work.cores_used < at_work.cores:
        workers = min(cores_needed, at_work.cores)
        return f"{cores}; it uses {at_work.cores_used} of {at_work.cores}: try --config.data.num_workers={workers}"
    return f"{cores}, or smaller images on disk, or less augmentation on the host"


def _training(source: Source, config: DataConfig, augment: AugmentConfig, size: transforms.Size) -> Callable[..., Any]:
    reader = reader_of(source, config, size, augment)
    return lambda index: reader.random(index, np.random.default_rng(index))
