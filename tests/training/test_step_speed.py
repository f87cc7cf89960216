"""Which step is timed; how it is timed is tested with the command (tests/cli/test_doctor.py)."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from top_jax.config import DistillationConfig, OptimizerConfig, RunConfig
from top_jax.errors import InputError, RunError
from top_jax.training import step_speed
from top_jax.training.saved_weights import initial_weights
from top_jax.training.step_speed import measure_step, timed_batch_size


@pytest.mark.parametrize(
    ("platform", "devices", "configured", "accumulate", "size"),
    [
        ("gpu", 4, 1024, 2, 1024),  # the run's own
        ("cpu", 1, 128, 1, 8),
        ("cpu", 1, 4, 1, 4),
        ("cpu", 8, 1024, 1, 64),
        ("cpu", 1, 120, 3, 6),  # three micro-batches divide it
        ("cpu", 2, 80, 5, 10),
        ("cpu", 1, 160, 16, 16),  # no smaller one can be cut
    ],
)
def test_batch_size(monkeypatch, platform, devices, configured, accumulate, size):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)] * devices)
    config = RunConfig(batch_size=configured, optimizer=OptimizerConfig(accumulate=accumulate))
    assert timed_batch_size(config) == size


def test_a_batch_that_cannot_be_cut(tiny_config):
    with pytest.raises(InputError, match="step_batch_size=7 .* 2 micro-batches"):
        measure_step(tiny_config, batch_size=7)


def test_a_batch_that_does_not_fit(tiny_config, monkeypatch):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr(step_speed, "_measure", full)
    with pytest.raises(RunError, match="16 images .*--step_batch_size"):
        measure_step(tiny_config, batch_size=16)


def test_other_errors_are_not_hidden(tiny_config, monkeypatch):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(step_speed, "_measure", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        measure_step(tiny_config)


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 3, 3), (1e6, 20, 20)])
def test_how_many_steps_are_timed(tiny_config, seconds, least, most):
    """Each takes the state of the one before it, whose memory it was given; the first does not count."""
    states = []

    def step(state):
        states.append(state)
        return state + 1, {}

    times = step_speed._time(step, 0, seconds)
    assert least <= len(times) <= most and states == list(range(len(times) + 1))


@pytest.mark.slow
def test_no_checkpoint_is_read(tiny_config):
    """The weights' values do not matter, and the files may not be here. A teacher takes memory and is timed too."""
    config = dataclasses.replace(tiny_config, init_from="/nowhere.pth")
    found = measure_step(config, batch_size=4, seconds=0.0)
    assert (found.batch_size, found.steps, found.devices) == (4, 3, len(jax.devices()))
    assert found.images_per_second == pytest.approx(4 / found.seconds) and found.compile_seconds > 0
    taught = dataclasses.replace(config, distillation=DistillationConfig(teacher="/nowhere.pth"))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_weights(tiny_config)))
    more = measure_step(taught, batch_size=4, seconds=0.0).memory["arguments"] - found.memory["arguments"]
    assert 0.9 * weights < more <= weights  # what XLA finds unused (a last layer's) is no argument
