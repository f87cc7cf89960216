"""How long a training step takes: the run's own, compiled, on a batch of random pixels that is on the devices."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from top_jax.build import build_abstract_model, build_reduction
from top_jax.config import RunConfig
from top_jax.errors import RunError
from top_jax.memory import step_memory
from top_jax.models import Backbone
from top_jax.sharding import by_image, check_divisible, in_parts, make_mesh
from top_jax.training.optimizer import learning_rate_schedule, make_optimizer
from top_jax.training.programs import compile_step
from top_jax.training.start import first_state
from top_jax.training.steps import DeviceBatch, make_train_step
from top_jax.training.weights import initial_weights

CPU_IMAGES = 8  # a device: a CPU takes seconds for these already
FEWEST_STEPS, MOST_STEPS = 3, 20


@dataclasses.dataclass(frozen=True)
class StepSpeed:
    """A timed training step.

    Attributes:
        batch_size: images a step, over all devices and micro-batches.
        devices: how many.
        device: their kind.
        steps: how many were timed, after one that was not.
        seconds: median of a step.
        compile_seconds: to trace and compile it.
        memory: of the compiled step on each device (`top_jax.memory.step_memory`).
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
        """Over all devices."""
        return self.batch_size / self.seconds


def timed_batch_size(config: RunConfig) -> int:
    """The run's batch size; on CPUs, which would take minutes for it, a small one that the devices divide."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return config.batch_size
    smallest = len(devices) * config.optimizer.accumulate
    most = min(CPU_IMAGES * len(devices), config.batch_size)
    return max(smallest, most - most % smallest)


def measure_step(config: RunConfig, *, batch_size: int | None = None, seconds: float = 3.0) -> StepSpeed:
    """Compiles and times the config's training step, with all its pruning and, where it has one, its teacher.

    Nothing is read from a disk: weights (the teacher's too), pixels and labels are random, and lie on the devices
    before the first step.

    Args:
        config: of the run.
        batch_size: images a step over all devices; None is `timed_batch_size`.
        seconds: after which no further step is begun; at least three are timed, and at most twenty.

    Raises:
        InputError: a model or schedule that cannot be, or a batch that the devices do not divide.
        RunError: a batch that does not fit into the devices' memory.
    """
    batch_size = timed_batch_size(config) if batch_size is None else batch_size
    check_divisible("step_batch_size", batch_size, config.optimizer.accumulate)
    try:
        return _measure(dataclasses.replace(config, batch_size=batch_size, init_from=None), seconds)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"a training step of {batch_size} images does not fit into the memory of {len(jax.devices())} x "
            f"{jax.devices()[0].device_kind}; try a smaller --step_batch_size (and --config.batch_size, a larger "
            "optimizer.accumulate, or model.remat=True)."
        ) from error


def _measure(config: RunConfig, seconds: float) -> StepSpeed:
    pruning = build_reduction(config.pruning)
    model = build_abstract_model(config.model, pruning)
    mesh = make_mesh(config.fsdp)
    # Only the cost of a step counts, and no schedule changes it.
    schedule = learning_rate_schedule(
        config.optimizer, batch_size=config.batch_size, total_steps=2, steps_per_epoch=1.0
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    weights = jax.device_get(initial_weights(config))
    state, batch = first_state(config, model, optimizer, mesh, weights), _random_batch(config, model, mesh)
    teacher, teacher_weights = None, None
    if config.distillation.teacher is not None:  # the dense model; it has the same parameters
        teacher = nnx.graphdef(build_abstract_model(config.model))
        teacher_weights = jax.device_put(weights, in_parts(mesh, weights))
    step = make_train_step(nnx.graphdef(model), optimizer, config, teacher)
    begun = time.perf_counter()
    program = compile_step(step, mesh, state, batch, teacher_weights)
    compile_seconds = time.perf_counter() - begun
    times = _time(lambda state: program(state, batch, teacher_weights), state, seconds)
    return StepSpeed(
        batch_size=config.batch_size,
        devices=len(jax.devices()),
        device=jax.devices()[0].device_kind,
        steps=len(times),
        seconds=statistics.median(times),
        compile_seconds=compile_seconds,
        memory=step_memory(program),
    )


def _time(step: Callable[[Any], tuple[Any, Any]], state: Any, seconds: float) -> list[float]:
    """Seconds of each step but the first, which still has to find its memory."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) <= FEWEST_STEPS or (len(times) <= MOST_STEPS and time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        state, metrics = step(state)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return times[1:]


def _random_batch(config: RunConfig, model: Backbone, mesh: Mesh) -> DeviceBatch:
    rng, size = np.random.default_rng(0), config.batch_size
    batch = {
        "image": rng.integers(0, 256, (size, *model.config.img_size, 3), dtype=np.uint8),
        "label": rng.integers(0, config.model.num_classes, size, dtype=np.int32),
        "mask": np.ones(size, np.float32),
        "index": np.arange(size, dtype=np.int32),
    }
    return jax.device_put(batch, by_image(mesh))
