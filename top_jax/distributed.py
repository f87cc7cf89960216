"""Runs of several processes: starts `jax.distributed`, and makes the decisions that all processes must share.

Every process runs the same program on its own devices, and a collective computation waits until all processes reach it.
So what only one process knows (a signal, an error, a full disk) is sent to all before any of them acts on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from top_jax import sharding
from top_jax.errors import InputError, RunError, write_last_line

LEAVE_SECONDS: Final = 5.0  # time for the other processes to end too, after an error
# Parts of the errors of collectives (Gloo, NCCL) and of JAX's coordination service when another process is gone.
_OF_ANOTHER = re.compile(
    r"gloo|nccl|coordination.?service|heartbeat|barrier timed out|socket closed|connection (closed|reset|refused)"
    r"|^(unavailable|deadline_exceeded)\b",
    re.IGNORECASE,
)
_AGAIN: Final = "Start the same command again in every process: the run goes on from its last checkpoint."


class ProcessLost(RunError):
    """Raised when another process of the run ended or cannot be reached: no collective computation can finish."""


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 20,
    start_timeout: int = 300,
) -> None:
    """Joins the other processes; must be called before anything uses a JAX device.

    On SLURM, Cloud TPU, Open MPI and Kubernetes, JAX detects arguments that are not given.

    Args:
        coordinator_address: "host:port" of process 0, reachable from all.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        heartbeat_timeout: stop if another process is silent for this many seconds.
        start_timeout: seconds to wait for the others.

    Raises:
        InputError: an argument is wrong, or is missing and cannot be detected.
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
            f"JAX detects no cluster here (SLURM, Cloud TPU, Open MPI, Kubernetes): {str(error).rstrip('.')}. "
            f"Pass {', '.join(missing) or 'other values'} to every process."
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the processes cannot connect ({error}); process 0 must listen at the coordinator's address."
        ) from error
    _end_aborts_with_a_line()


def _wait_for(host: str, port: int, seconds: int) -> None:
    """Waits until process 0 listens at its address; JAX itself would abort the process after its timeout."""
    deadline, announced = time.monotonic() + seconds, False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process 0 does not listen at {host}:{port} after {seconds} s ({error}); start "
                    "process 0 there, or pass its address with --coordinator_address."
                ) from error
        if not announced:
            print(f"waiting for process 0 at {host}:{port}, at most {seconds} s", file=sys.stderr)
            announced = True
        time.sleep(0.5)


_leaving: list[int] = []  # the exit status, once `leave` is called


def _end_aborts_with_a_line() -> None:
    """Makes a process that JAX aborts end with a one-line message and exit status 1.

    When another process is silent for too long, JAX's client aborts this one from a C++ thread, whatever the main
    thread waits for. JAX offers no way to replace that (in 0.10 its callback cannot be a Python function), and Python
    handles SIGABRT only after the process is gone. So the handler is installed through libc.
    """
    if os.name != "posix":
        return

    def on_abort(number: int) -> None:
        if not _leaving:
            write_last_line(
                "error: JAX aborted this process, for the reason above: most likely another process of the run ended, "
                f"or cannot be reached any more. {_AGAIN}"
            )
        os._exit(_leaving[0] if _leaving else 1)

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _kept.append(handler)  # kept alive, because libc holds only its address
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_kept: list[Any] = []


def lost_process(error: BaseException | None) -> ProcessLost | None:
    """Returns the message if an error means that another process is gone; None otherwise, or in a single process."""
    if not jax.distributed.is_initialized():
        return None
    while error is not None and not isinstance(error, (InputError, RunError)):
        if found := _OF_ANOTHER.search(str(error)):
            line = next(line for line in str(error).splitlines() if found[0] in line)
            return ProcessLost(
                f"another process of the run ended, or cannot be reached any more ({line.strip()[:200]}). {_AGAIN}"
            )
        error = error.__cause__ or error.__context__
    return None


def leave(status: int, *, wait: bool = True) -> NoReturn:
    """Ends this process after an error, whatever the others do.

    Without this, JAX waits up to 300 s at the exit for the others, which wait for this process.

    Args:
        status: exit status.
        wait: whether the others may be about to end too. Process 0 runs their coordinator, so it must not end first.
    """
    _leaving.append(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if wait:
        ending = threading.Thread(target=_shut_down, daemon=True)
        ending.start()
        ending.join(LEAVE_SECONDS)
    os._exit(status)


def _shut_down() -> None:
    with contextlib.suppress(Exception):  # the process ends with the error that was reported, whatever happens here
        jax.distributed.shutdown()


def is_primary() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> Any:
    """Returns whether `flag` is true in any process, as a scalar whose `bool` waits for the answer.

    This is a collective operation: every process must call it at the same point.
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
    """Runs a block in every process; if it raises in one, all raise.

    Raises:
        RunError: the block failed in another process, which reports why.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception:
        try:
            bool(any_process(True))
        except Exception as lost:  # then no process is left to inform
            if lost_process(lost) is None:
                raise
        raise
    if any_process(False):
        raise RunError("another process failed; see its message.")


def from_primary(value: Any) -> Any:
    """Returns the first process's value, a JSON value, in every process; every process must call this."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    mine = text if is_primary() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes())


def check_same(settings: dict[str, Any]) -> None:
    """Checks that all processes have the same settings.

    Args:
        settings: by name; every process must call this.

    Raises:
        InputError: a setting differs; raised in every process, with the setting and this process's value.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(repr(settings[name]).encode()) for name in sorted(settings)], np.uint32)
    differs = np.any(multihost_utils.process_allgather(digests) != digests, axis=0)
    if found := [name for name, other in zip(sorted(settings), differs, strict=True) if other]:
        values = ", ".join(f"{name}={settings[name]!r} in process {jax.process_index()}" for name in found[:3])
        raise InputError(
            f"the processes were started with different settings ({values}{', ...' * (len(found) > 3)}); start all of "
            "them with the same command."
        )


def to_global(tree: Any, shardings: Any) -> Any:
    """Distributes arrays, of which every process has the whole, over the devices of all processes.

    Args:
        tree: arrays, equal in all processes.
        shardings: one for each array.
    """

    def place(array: Any, on: jax.sharding.Sharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, on, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)
