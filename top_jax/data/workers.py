"""What Grain's worker processes need beside their work: flags, signals and an end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from absl import flags


def count(num_workers: int | None) -> int:
    """Worker processes to start; None is one per core, at most 16."""
    return min(available_cores(), 16) if num_workers is None else num_workers


def available_cores() -> int:
    """Cores that this process may run on, which a cluster often makes fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def mark_flags_parsed() -> None:
    """Lets Grain read its absl flags in a program that parsed none (a notebook, a test, a library user)."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def set_up_worker(worker: int, num_workers: int) -> None:
    """Runs first in every worker process.

    The parent decides when its workers end. Ctrl-C and a cluster's SIGTERM reach the whole process group; a
    worker that died of them would fail the parent's next batch while it is saving its last checkpoint.
    """
    del worker, num_workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A parent that was killed cannot tell its workers to stop: Grain's would wait for ever.
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)
