"""The flags that make one run out of several processes; nothing of JAX is loaded with them."""

from __future__ import annotations

from absl import flags

from top_jax.errors import InputError

_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "This process is one of several of a run (docs/scaling.md). On SLURM, Cloud TPU, Open MPI and Kubernetes nothing "
    "else is needed; elsewhere give the next three.",
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, reachable from all.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds without a sign of life after which the others end too.", lower_bound=1
)
_START = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the others at the start.", lower_bound=1)


def join() -> None:
    """Joins the other processes where the command line says that there are any; before JAX looks for devices.

    Raises:
        InputError: what is given does not fit together, or is not enough.
        RunError: the others cannot be reached.
    """
    by_hand = {
        "coordinator_address": _COORDINATOR.value,
        "num_processes": _PROCESSES.value,
        "process_id": _PROCESS.value,
    }
    if not _DISTRIBUTED.value:
        if given := [name for name, value in by_hand.items() if value is not None]:
            raise InputError(f"--{given[0]} is given without --distributed; add it, or drop the other.")
        return

    from top_jax import distributed

    distributed.initialize(**by_hand, heartbeat_timeout=_HEARTBEAT.value, start_timeout=_START.value)
