"""Times a run's own compiled training step, on a batch of random pixels in the devices' memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from top_jax.build import crop_size
from top_jax.config import RunConfig
from top_jax.data import DeviceBatch
from top_jax.errors import RunError
from top_jax.memory import out_of_memory
from top_jax.sharding import check_divisible
from top_jax.training.prepare import Plan, make_plan
from top_jax.training.programs import TrainPrograms
from top_jax.training.saved_weights import initial_weights

CPU_IMAGES = 8  # per device: a CPU takes seconds even for these
FEWEST_STEPS, MOST_STEPS = 3, 20


@dataclasses.dataclass(frozen=True)
class StepSpeed:
    """A timed training step.

    Attributes:
        batch_size: images per step, over all devices and micro-batches.
        devices: number of devices.
        device: their kind.
        steps: number of timed steps, after a first one that is not timed.
        seconds: median time of a step.
        compile_seconds: time to trace and compile it.
        memory: bytes that the compiled step takes on each device (`top_jax.memory.program_memory`).
    """

    batch_size: int
    devices: int
    device: str
    steps: int
    seconds: float
    compile_seconds: float
    memory: dict[str, int]

    @property
    def images_per_second(self) -> float:
        """Training speed over all devices."""
        return self.batch_size / self.seconds


def timed_batch_size(config: RunConfig) -> int:
    """Returns the run's batch size; on CPUs, which would take minutes, a small multiple of the number of devices."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return config.batch_size
    smallest = len(devices) * config.optimizer.accumulate
    most = min(CPU_IMAGES * len(devices), config.batch_size)
    return max(smallest, most - most % smallest)


def measure_step(config: RunConfig, *, batch_size: int | None = None, seconds: float = 3.0) -> StepSpeed:
    """Compiles and times the config's training step, with its final pruning and its teacher, if it has one.

    Nothing is read from disk: weights (also the teacher's), pixels and labels are random, and in the devices' memory
    before the first step.

    Args:
        config: the run's config.
        batch_size: images per step over all devices; None takes `timed_batch_size`.
        seconds: no step starts later than this; at least three and at most twenty steps are timed.

    Raises:
        InputError: impossible model settings, or a batch that the devices do not divide.
        RunError: a batch that does not fit into the devices' memory.
    """
    batch_size = timed_batch_size(config) if batch_size is None else batch_size
    check_divisible("step_batch_size", batch_size, config.optimizer.accumulate)
    try:
        return _measure(dataclasses.replace(config, batch_size=batch_size, init_from=None), seconds)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"a training step of {batch_size} images does not fit into the memory of {len(jax.devices())} x "
            f"{jax.devices()[0].device_kind}; try a smaller --step_batch_size (and --config.batch_size, a larger "
            "optimizer.accumulate, or model.remat=True)."
        ) from error


def _measure(config: RunConfig, seconds: float) -> StepSpeed:
    # Only the final pruning is timed, and the epoch has one step: the schedules do not change a step's cost.
    pruning = dataclasses.replace(config.pruning, warmup_epochs=0.0)
    plan = make_plan(dataclasses.replace(config, pruning=pruning), num_images=config.batch_size)
    weights = jax.device_get(initial_weights(config))
    state, batch = plan.first_state(weights), _random_batch(plan)
    programs = TrainPrograms(plan, None if plan.teacher is None else weights)  # the dense model has the same parameters
    begun = time.perf_counter()
    programs.compile(0, state, batch)
    compile_seconds = time.perf_counter() - begun
    times = _time(lambda state: programs(0, state, batch), state, seconds)
    return StepSpeed(
        batch_size=config.batch_size,
        devices=len(jax.devices()),
        device=jax.devices()[0].device_kind,
        steps=len(times),
        seconds=statistics.median(times),
        compile_seconds=compile_seconds,
        memory=programs.memory(),
    )


def _time(step: Callable[[Any], tuple[Any, Any]], state: Any, seconds: float) -> list[float]:
    """Returns the seconds of each step except the first, which still allocates memory."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) <= FEWEST_STEPS or (len(times) <= MOST_STEPS and time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        state, metrics = step(state)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return times[1:]


def _random_batch(plan: Plan) -> DeviceBatch:
    rng, size, num_classes = np.random.default_rng(0), plan.config.batch_size, plan.config.model.num_classes
    sides, dense = crop_size(plan.config), plan.config.model.is_segmenter
    batch = {
        "image": rng.integers(0, 256, (size, *sides, 3), dtype=np.uint8),
        "label": rng.integers(0, num_classes, (size, *sides) if dense else size, dtype=np.int32),
        "mask": np.ones(size, np.float32),
        "index": np.arange(size, dtype=np.int32),
    }
    if dense:  # normalised images and 8-bit labels, as from the pipeline
        batch |= {"image": batch["image"].astype(np.float32) / 128 - 1, "label": batch["label"].astype(np.uint8)}
    return jax.device_put(batch, plan.by_image)
