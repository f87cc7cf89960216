"""Several processes as one: what one process can test. Two real ones: tests/training/test_faults.py."""

from __future__ import annotations

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from top_jax import distributed, sharding
from top_jax.errors import InputError, RunError
from top_jax.training.checkpoints import Checkpoints


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


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error: Connection reset by peer"), True),
        (RuntimeError("NCCL operation ncclAllReduce failed: remote process exited"), True),
        (RuntimeError("INTERNAL: step failed\nUNAVAILABLE: Socket closed"), True),
        (ValueError("operands could not be broadcast together"), False),
        (InputError("the config has no key 'gloo'"), False),
    ],
)
def test_lost_process(monkeypatch, error, lost):
    assert distributed.lost_process(error) is None  # alone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert (distributed.lost_process(error) is not None) == lost
    wrapped = KeyError("while saving")
    wrapped.__context__ = error  # as `together` and Orbax leave it
    assert (distributed.lost_process(wrapped) is not None) == lost


def test_a_save_is_not_waited_for_without_the_others(monkeypatch, tmp_path):
    """What it waits for would never come."""
    closed = []
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for message, expected in (("Gloo all-reduce failed", 0), ("another error", 1)):
        with pytest.raises(ValueError, match=message), Checkpoints(tmp_path):
            raise ValueError(message)
        assert len(closed) == expected


def test_the_first_process_knows(monkeypatch):
    assert distributed.from_primary({"loss": 0.1}) == {"loss": 0.1}
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda value: sent.append(value) or value)
    assert distributed.from_primary({"loss": 0.1, "none": None}) == {"loss": 0.1, "none": None}
    assert [value.dtype for value in sent] == [np.int32, np.uint8]


ABORTED = """
import ctypes, threading
from top_jax import distributed
distributed._end_aborts_with_a_line()
ending = threading.Thread(target=ctypes.CDLL(None).abort)  # as JAX's client, in a thread of its own
ending.start()
ending.join()
"""


@pytest.mark.slow
def test_an_abort_ends_with_a_line(root):
    ended = subprocess.run([sys.executable, "-c", ABORTED], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: JAX aborted this process")
