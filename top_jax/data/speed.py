"""How many images a second this machine reads, decodes and augments, by stage and as the whole pipeline."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import transforms, workers
from top_jax.data.examples import ExampleReader
from top_jax.data.pipeline import train_batches
from top_jax.data.sources import Source

BATCH_SECONDS: Final = 0.25  # of one core for a batch, so that a measurement of seconds has enough of them
LITTLE_TO_SPARE: Final = 0.8  # share of the time that the loader is busy
PLAIN: Final = AugmentConfig()


class Speed(NamedTuple):
    """What was counted, and in how long."""

    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """The rate."""
        return self.images / self.seconds


class PipelineSpeed(NamedTuple):
    """The whole pipeline, as a run starts it.

    Attributes:
        images: counted, after the warm-up.
        seconds: that they took.
        batch_size: images in a batch of the measurement.
        start_seconds: until the first batch, worker processes and their imports included.
    """

    images: int
    seconds: float
    batch_size: int
    start_seconds: float

    @property
    def images_per_second(self) -> float:
        """The rate."""
        return self.images / self.seconds


class Lanes(NamedTuple):
    """What decodes: threads in worker processes, or (`workers` 0) in the process that trains."""

    cores: int  # that this process may use
    workers: int
    threads: int  # of each worker

    @property
    def total(self) -> int:
        """Images in the making at a time, at most."""
        return max(1, self.workers) * max(1, self.threads)

    @property
    def cores_used(self) -> int:
        """Cores that they can keep busy."""
        return min(self.cores, self.total)


def lanes(config: DataConfig) -> Lanes:
    """What a run with this config decodes with, on this machine."""
    return Lanes(workers.available_cores(), workers.count(config.num_workers), config.num_threads)


def stages(
    source: Source, config: DataConfig, augment: AugmentConfig, size: transforms.Size
) -> dict[str, Callable[[int], Any]]:
    """What happens to image `index` on the host, each stage with all before it, by a name that says so.

    The last is left out where nothing on the host follows the crop.
    """

    def read_and_decode(index: int) -> None:
        try:
            transforms.decode(source[index].image)
        except transforms.DECODE_ERRORS:
            pass  # it takes its time like any other; the inspection names it

    config = dataclasses.replace(config, on_corrupt="skip")
    found = {"read + decode": read_and_decode, "read + decode + crop": _training(source, config, PLAIN, size)}
    if augment.rand_augment is not None or augment.color_jitter:
        found["read + decode + crop + augment"] = _training(source, config, augment, size)
    return found


def measure_stage(stage: Callable[[int], Any], images: int, *, seconds: float, start: int = 0) -> Speed:
    """Runs a stage in this thread, over images in random order as a run reads them, again from the first if need be.

    Args:
        stage: takes an index.
        images: in the split.
        seconds: after which no further image is begun; one is always measured.
        start: place in that order to begin at. Files that were read a moment ago come from memory: with another start
            for each stage, none profits from the one before it, where there are images enough.
    """
    order = np.random.default_rng(0).permutation(images)
    begun, count, spent = time.perf_counter(), 0, 0.0
    while not count or spent < seconds:
        stage(int(order[(start + count) % images]))
        count += 1
        spent = time.perf_counter() - begun
    return Speed(count, spent)


def measuring_batch_size(configured: int, *, images: int, images_per_second: float) -> int:
    """The run's own batch size, or what one core makes in a quarter of a second where that is less."""
    return max(1, min(configured, images, int(images_per_second * BATCH_SECONDS)))


def measure_pipeline(
    source: Source,
    config: DataConfig,
    augment: AugmentConfig,
    size: transforms.Size,
    *,
    batch_size: int,
    seconds: float,
) -> PipelineSpeed:
    """Draws training batches as fast as they come, with the run's worker processes and threads.

    First as many are drawn as may lie ready, made while the others were starting.

    Args:
        source: the training images.
        config: of the run.
        augment: of the run.
        size: of the model's input.
        batch_size: at most the number of images.
        seconds: after which no further round (a batch from every thread) is begun; one is always measured.
    """
    at_work = lanes(config)
    config = dataclasses.replace(config, on_corrupt="skip")
    with train_batches(source, config, augment=augment, img_size=size, batch_size=batch_size, seed=0) as batches:
        begun = time.perf_counter()
        next(batches)
        start_seconds = time.perf_counter() - begun
        for _ in range(at_work.total + 2 * at_work.workers):  # what threads, and queues from processes, hold
            next(batches)
        begun, drawn, spent = time.perf_counter(), 0, 0.0
        while not drawn or spent < seconds:
            for _ in range(at_work.total):
                next(batches)
            drawn += at_work.total
            spent = time.perf_counter() - begun
    return PipelineSpeed(drawn * batch_size, spent, batch_size, start_seconds)


class Verdict(NamedTuple):
    """Whether the loader holds up the step.

    Attributes:
        bottleneck: it does.
        busy: share of the time that the loader would work to feed the step; above 1 where it cannot.
        cores_needed: for as many images as the step takes, at the rate per core that was measured.
        text: all of it in words.
    """

    bottleneck: bool
    busy: float
    cores_needed: int
    text: str


def verdict(given: float, needed: float, at_work: Lanes) -> Verdict:
    """Compares the loader with the training step.

    Args:
        given: images a second of the whole pipeline.
        needed: images a second that the step takes, over all devices.
        at_work: what the pipeline decodes with.
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
    """The pipeline's rate in words."""
    used = at_work.cores_used
    cores = f"{used} core{'s' * (used != 1)}"
    of_all = "" if used == at_work.cores else f" of {at_work.cores}"
    return f"the loader gives {number(given)} img/s ({number(given / used)} per core on {cores}{of_all})"


def number(rate: float) -> str:
    """Three digits of a rate, or all before the point: 3.42, 31, 2,041."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _remedy(cores_needed: int, at_work: Lanes) -> str:
    cores = f"About {cores_needed} cores of this kind would do"
    if at_work.cores_used < at_work.cores:
        return f"{cores}; it uses {at_work.cores_used} of {at_work.cores}: try --config.data.num_workers=" + str(
            min(cores_needed, at_work.cores)
        )
    return f"{cores}, or smaller images on the disk, or less augmentation on the host"


def _training(source: Source, config: DataConfig, augment: AugmentConfig, size: transforms.Size) -> Callable[..., Any]:
    reader = ExampleReader(source, config, size, augment)
    return lambda index: reader.random(index, np.random.default_rng(index))
