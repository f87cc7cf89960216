"""Several processes as one: JAX's own `jax.distributed`, and the few things they must decide together.

Every process runs the same program on its own devices, so each must come to each collective computation, or all wait.
What only one of them knows (a signal, an error, a full disk) therefore goes to all before anyone acts on it.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from top_jax import sharding
from top_jax.errors import InputError, RunError


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
    start_timeout: int = 300,
) -> None:
    """Joins the other processes; to be called before anything asks JAX for a device.

    On SLURM, Cloud TPU, Open MPI and Kubernetes JAX finds out by itself what is not given.

    Args:
        coordinator_address: "host:port" of process 0, reachable from all.
        num_processes: how many there are.
        process_id: which this is, from 0.
        heartbeat_timeout: seconds after which a process that is not heard of counts as lost, and the others end.
        start_timeout: seconds to wait for the others.

    Raises:
        InputError: something is not given and cannot be found out, or cannot be.
        RunError: the others cannot be reached.
    """
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise InputError(f"process_id={process_id} must be 0 .. {num_processes - 1} (num_processes - 1).")
    if coordinator_address is not None:
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"coordinator_address={coordinator_address!r} must be HOST:PORT, such as 10.0.0.1:9876.")
        if process_id:
            _wait_for(host.strip("[]"), int(port), start_timeout)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, TypeError) as error:
        given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
        missing = [f"--{name}" for name, value in given.items() if value is None]
        raise InputError(
            f"this is no cluster that JAX knows (SLURM, Cloud TPU, Open MPI, Kubernetes): {str(error).rstrip('.')}. "
            f"Pass {', '.join(missing) or 'other values'} to every process."
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the processes did not find each other ({error}); process 0 must listen at the coordinator's address."
        ) from error


def _wait_for(host: str, port: int, seconds: int) -> None:
    """Returns once somebody listens there. JAX, where it has waited in vain, aborts the process."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"nobody listens at the coordinator's address {host}:{port} after {seconds} s ({error}); start "
                    "process 0 there, or pass its address with --coordinator_address."
                ) from error
        if not told:
            print(f"waiting for process 0 at {host}:{port}, at most {seconds} s", file=sys.stderr)
            told = True
        time.sleep(0.5)


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


def check_same(settings: dict[str, Any]) -> None:
    """Makes sure that all processes were started alike: each calls it with what must be equal in all, by name.

    Raises:
        InputError: in every process, where a setting differs in any; it names the setting and this process's value.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(repr(settings[name]).encode()) for name in sorted(settings)], np.uint32)
    differs = np.any(multihost_utils.process_allgather(digests) != digests, axis=0)
    if found := [name for name, other in zip(sorted(settings), differs, strict=True) if other]:
        told = ", ".join(f"{name}={settings[name]!r} in process {jax.process_index()}" for name in found[:3])
        raise InputError(
            f"the processes were started with different settings ({told}{', ...' * (len(found) > 3)}); start all of "
            "them with the same command."
        )


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
