"""Several processes as one: what one process can test. Two real ones: tests/training/test_faults.py."""

from __future__ import annotations

import socket

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
    with pytest.raises(RunError, match="another process"), distributed.together():
        pass
    assert asked == [False, True, False]


def test_outside_of_a_cluster(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")  # JAX's words, where it finds no cluster

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="--coordinator_address, --num_processes"):
        distributed.initialize(process_id=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator_address="10.0.0.1"), r"coordinator_address='10.0.0.1' must be HOST:PORT"),
        (dict(coordinator_address=":9876"), r"coordinator_address=':9876' must be HOST:PORT"),
        (dict(process_id=2, num_processes=2), r"process_id=2 must be 0 .. 1 \(num_processes - 1\)"),
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**given)


def test_nobody_listens(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunError, match=f"{address} after 0 s"):
        distributed.initialize(coordinator_address=address, num_processes=2, process_id=1, start_timeout=0)


def test_started_alike(monkeypatch):
    """Digests of both processes, as each sees them."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    changed = np.zeros(3, np.uint32)
    gather = lambda digests: np.stack([digests, digests ^ changed])  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    settings = {"seed": 4, "batch_size": 16, "workdir": "/runs/a"}
    distributed.check_same(settings)
    changed[1:] = 1  # by name: batch_size, seed, workdir
    with pytest.raises(InputError, match=r"\(seed=4 in process 0, workdir='/runs/a' in process 0\)"):
        distributed.check_same(settings)


def test_to_global():
    mesh = sharding.make_mesh()
    tree = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "n": jax.numpy.asarray(3)}
    placed = distributed.to_global(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))
    assert placed["w"].sharding == sharding.replicated(mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
