"""Several processes as one: JAX's own `jax.distributed`, and the few things they must decide together.

Every process runs the same program on its own devices, so each must come to each collective computation, or all wait.
What only one of them knows (a signal, an error, a full disk) therefore goes to all before anyone acts on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from top_jax import sharding
from top_jax.errors import InputError, RunError


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes; to be called before anything asks JAX for a device.

    On SLURM, Cloud TPU, Open MPI and Kubernetes JAX finds out by itself what is not given.

    Args:
        coordinator_address: "host:port" of process 0, reachable from all.
        num_processes: how many there are.
        process_id: which this is, from 0.
        heartbeat_timeout: seconds after which a process that is not heard of counts as lost, and the others end.

    Raises:
        InputError: something is not given and cannot be found out.
        RunError: the others cannot be reached.
    """
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{str(error).rstrip('.')}: this is no cluster that JAX knows (SLURM, Cloud TPU, Open MPI, Kubernetes); "
            "pass --coordinator_address=HOST:PORT, --num_processes and --process_id to every process."
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the processes did not find each other ({error}); process 0 must listen at the coordinator's address."
        ) from error


def is_primary() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def any_process(flag: bool) -> Any:
    """Whether `flag` holds in any process, as a scalar whose `bool` waits for the answer.

    A collective: every process must call it at the same place.
    """
    if jax.process_count() == 1:
        return np.bool_(flag)
    by_device, any_of = _any_program()
    local = np.full(jax.local_device_count(), flag)
    return any_of(jax.make_array_from_process_local_data(by_device, local))


@functools.cache
def _any_program() -> tuple[jax.sharding.NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = sharding.make_mesh()
    return sharding.by_image(mesh), jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process must get through: where one raises, all do.

    Raises:
        RunError: another process failed; that one says why.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception:
        bool(any_process(True))
        raise
    if any_process(False):
        raise RunError("another process could not go on; its message says why.")


def to_global(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, placed over the devices of all.

    Args:
        tree: arrays, equal in all processes.
        shardings: one for each.
    """

    def place(array: Any, on: jax.sharding.Sharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, on, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)
