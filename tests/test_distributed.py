"""Several processes as one: what can be told in one process. Two real ones: tests/training/test_processes.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from top_jax import distributed, sharding
from top_jax.errors import InputError, RunError


def test_alone():
    assert distributed.is_primary()
    assert not distributed.any_process(False) and distributed.any_process(True)
    with pytest.raises(ZeroDivisionError), distributed.together():
        raise ZeroDivisionError


@pytest.fixture
def answers(monkeypatch):
    """Two processes, as this one sees them: what it asked, and the flag of the other."""
    asked, other = [], [False]

    def any_process(flag):
        asked.append(flag)
        return np.bool_(flag or other[0])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "any_process", any_process)
    return asked, other


def test_an_error_is_everybodys(answers):
    """Every process asks once, whether it failed or not; else one would wait for ever."""
    asked, other = answers
    with distributed.together():
        pass
    with pytest.raises(ValueError, match="mine"), distributed.together():
        raise ValueError("mine")
    other[0] = True
    with pytest.raises(RunError, match="another process could not go on"), distributed.together():
        pass
    assert asked == [False, True, False]


def test_outside_of_a_cluster(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")  # JAX's words, where it finds no cluster

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="pass --coordinator_address=HOST:PORT, --num_processes and --process_id"):
        distributed.initialize()


def test_to_global():
    mesh = sharding.make_mesh()
    tree = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "n": jax.numpy.asarray(3)}
    placed = distributed.to_global(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))
    assert placed["w"].sharding == sharding.replicated(mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
