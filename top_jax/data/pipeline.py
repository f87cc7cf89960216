"""Batches through Grain, from a source to the devices.

Everything up to the batch is random access: batch n is a function of (source, config, seed, n) alone. So a run
resumes at batch n immediately, and neither threads nor worker processes can change what it sees.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import errno
import logging
import math
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import transforms
from top_jax.data.examples import DEFAULT_AUGMENT, PADDING_INDEX, ExampleReader
from top_jax.data.segmentation import EvalPlan, SegmentationReader
from top_jax.data.sources.base import Source, check_split, is_dense
from top_jax.data.transforms import as_size
from top_jax.errors import InputError, RunError
from top_jax.optional import optional_package
from top_jax.values import counted

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
"""Arrays image uint8 [B, H, W, 3], label int32 [B], mask float32 [B] (0: not to be counted), index int64 [B].

For a `DenseSource`: image float32 [B, H, W, 3], normalised, and label uint8 [B, H, W] (255: not to be counted).
"""

Reader = ExampleReader | SegmentationReader

DeviceBatch = dict[str, jax.Array]
"""A `Batch` on the devices; index becomes int32 unless JAX runs in 64 bits."""

MOST_WORKERS = 16
ENDED_SECONDS = 5  # after which a worker process that ended while starting ends the run
UNREADABLE_IN_A_ROW = 64  # different unreadable images (or a whole smaller split) that stop a run

_running: weakref.WeakSet[Batches] = weakref.WeakSet()


class _Said(NamedTuple):
    """Warnings already given about a source, which every evaluation and every rollback reads again."""

    unreadable: dict[int, str]  # a message for each index
    turned: list[int]  # the first index of an image that is shown as stored


_said: dict[int, _Said] = {}  # by id of the source, which may be unhashable


def _said_of(source: Source) -> _Said:
    if id(source) not in _said:
        _said[id(source)] = _Said({}, [])
        weakref.finalize(source, _said.pop, id(source), None)
    return _said[id(source)]


class Batches(Iterator[Batch]):
    """Iterates over batches; `get_state` and `set_state` resume exactly, at any batch.

    Close it, or use it as a context manager, to end its threads and worker processes early.

    Attributes:
        corrupt: for each unreadable image so far, by its index in the source, a line that says what is wrong.
    """

    def __init__(self, batches: Any, reader: Reader, *, most_in_a_row: int | None = None):
        """Wraps a grain.MapDataset of batches; use `train_batches` or `eval_batches` to make one.

        Args:
            batches: a dataset of batches of `Example`s or `PixelExample`s.
            reader: reads and transforms the examples.
            most_in_a_row: stop after this many distinct unreadable images without a readable one; None: never.
        """
        self.corrupt: dict[int, str] = {}
        self._most_in_a_row = most_in_a_row
        self._in_a_row: set[int] = set()
        self._any_readable = False
        self._batches = batches
        self._reader = reader
        self._next = 0
        self._iterator: Any = None

    def __len__(self) -> int:
        """Returns the number of batches; sys.maxsize for training."""
        return len(self._batches)

    def __next__(self) -> Batch:
        # Copied, because a worker's batch is in shared memory that Grain reuses.
        batch = {name: np.array(values) for name, values in self._next_of_grain().items()}
        self._next += 1
        self._note_turned(batch, batch.pop("ignored"))
        self._note_corrupt(batch)
        return batch

    def _next_of_grain(self) -> Batch:
        try:
            if self._iterator is not None:
                return next(self._iterator)
            iterator = _start(self._batches[self._next :], self._reader.config)
            first = _first(iterator)
            self._iterator = iterator  # only now, so that `close` does not wait for a start that hangs
            _running.add(self)
            return first
        except RuntimeError as error:
            if (ended := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))) is None:
                raise
            raise RunError(_worker_ended(int(ended[1]))) from error
        except OSError as error:  # not from the readers, which raise none
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise RunError(_worker_ended(-signal.SIGBUS)) from error

    def get_state(self) -> dict[str, int]:
        """Returns the position as JSON values: the number of batches returned so far."""
        return {"batches": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to the position of a `get_state`, in the same time for every position."""
        self.close()
        self._next = state["batches"]

    def close(self) -> None:
        """Ends the threads and worker processes; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _note_corrupt(self, batch: Batch) -> None:
        unreadable = (batch["mask"] == 0) & (batch["index"] != PADDING_INDEX)
        known = _said_of(self._reader.source).unreadable
        for index in map(int, batch["index"][unreadable]):
            if index not in known:
                known[index] = self._reader.problem(index)
                logger.warning("skipped unreadable image %d: %s", len(known), known[index])
            self.corrupt[index] = known[index]
        if batch["mask"].any():
            self._in_a_row.clear()
            self._any_readable = True
            return
        self._in_a_row.update(map(int, batch["index"][unreadable]))
        if self._most_in_a_row is not None and len(self._in_a_row) >= self._most_in_a_row:
            error = RunError if self._any_readable else InputError
            raise error(
                f"no image of the last {len(self._in_a_row)} of {self._reader.source.name} could be read, such as "
                f"{self.corrupt[min(self._in_a_row)]}; check that the data is still accessible, then start the same "
                "command again."
            )

    def _note_turned(self, batch: Batch, ignored: np.ndarray) -> None:
        source, turned = self._reader.source, np.flatnonzero(ignored)
        if turned.size and not (said := _said_of(source).turned):
            said.append(int(batch["index"][turned[0]]))
            name, orientation = source.describe(int(batch["index"][turned[0]])), ignored[turned[0]]
            logger.warning(transforms.NOT_FOLLOWED, name, orientation, "--config.data.exif_rotate=True")


def train_batches(
    source: Source,
    config: DataConfig,
    *,
    augment: AugmentConfig = DEFAULT_AUGMENT,
    img_size: int | Sequence[int],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Makes endless training batches, len(source) // batch_size per epoch, with new order and augmentation each epoch.

    The augmentation of an example is a function of the seed and the example's index in the stream. With several
    hosts, host p gets the rows p * B .. (p + 1) * B of every global batch, B = batch_size / process_count. Put
    together, these rows are the batch that a single host would see.

    With `augment.repeats` = r, the copies of an image follow each other, and the images of an epoch are the first
    1 / r of its shuffle. This is repeated augmentation as in DeiT (samplers.py: RASampler), except that DeiT gives the
    copies to different GPUs of a step, while here they are in one global batch.

    Args:
        source: the training images.
        config: the crop, what to do with unreadable images, and how many threads and processes decode.
        augment: RandAugment, colour jitter and repeats; the rest runs on the device (`device_augment`). For a
            `DenseSource`: repeats, flip and photometric distortion.
        img_size: side or (height, width) of the model's input, in pixels; for a `DenseSource`, of the crop.
        batch_size: images in a batch, over all hosts.
        seed: 0 .. 2**32 - 1.
        process_index: this host, as jax.process_index().
        process_count: the number of hosts.

    Raises:
        InputError: there are fewer images than a batch needs, a label is not a class, the hosts do not divide the batch
            size, or a setting is impossible.
    """
    grain = _grain()
    from top_jax.data import index_map

    check_split(source)
    local_size = _local_batch_size(batch_size, process_count)
    reader = reader_of(source, config, as_size(img_size), augment)
    if len(source) < batch_size:
        raise InputError(
            f"{source.name} has {counted(len(source), 'image')}, fewer than batch_size={batch_size}; use a smaller "
            "batch."
        )
    kept = len(source) - len(source) % batch_size
    shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    # Augment before sharing: the augmentation of an example depends on its index among the examples of all hosts.
    examples = index_map.repeat_each(shuffled, augment.repeats, kept).random_map(reader.random)
    rows = index_map.host_share(examples, batch_size, process_index, process_count)
    return Batches(rows.batch(local_size).repeat(), reader, most_in_a_row=min(UNREADABLE_IN_A_ROW, len(source)))


def eval_batches(
    source: Source,
    config: DataConfig,
    *,
    img_size: int | Sequence[int],
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    rows_multiple: int = 1,
) -> Batches:
    """Makes batches of every image exactly once, in order; arguments and rows per host as in `train_batches`.

    All batches have the same shape: the last is padded with rows of mask 0 and index -1.

    For a `DenseSource`, the images and labels of a batch have one size, the largest come first, and large images come
    in smaller batches (`SegmentationReader.plan`). Every batch has a multiple of `rows_multiple` rows, the number of
    devices that share it; so some are padded.

    Raises:
        InputError: there is no image, a label is not a class, the hosts do not divide the batch size, or a setting is
            impossible.
    """
    grain = _grain()
    from top_jax.data import index_map

    check_split(source)
    local_size = _local_batch_size(batch_size, process_count)
    reader = reader_of(source, config, as_size(img_size))
    if isinstance(reader, SegmentationReader):
        plan = reader.plan(batch_size, math.lcm(rows_multiple, process_count))
        shares = [_share_of(part, process_index, process_count) for part in plan]
        return Batches(grain.MapDataset.source(shares).map(reader.fixed_batch), reader)
    padded = -(-len(source) // batch_size) * batch_size
    examples = grain.MapDataset.range(padded).map(reader.fixed)
    rows = index_map.host_share(examples, batch_size, process_index, process_count)
    return Batches(rows.batch(local_size), reader)


def reader_of(
    source: Source, config: DataConfig, size: transforms.Size, augment: AugmentConfig = DEFAULT_AUGMENT
) -> Reader:
    """Returns the reader that makes rows of batches from `source`; raises InputError for an impossible setting."""
    if is_dense(source):
        return SegmentationReader(source, config, size, augment)
    return ExampleReader(source, config, size, augment)


def _share_of(plan: EvalPlan, process_index: int, process_count: int) -> EvalPlan:
    """Returns the rows of one host."""
    rows = len(plan["indices"]) // process_count
    indices = plan["indices"][process_index * rows : (process_index + 1) * rows]
    return EvalPlan(indices=indices, size=plan["size"])


def prefetch_to_device(
    batches: Batches, sharding: jax.sharding.Sharding, size: int = 2
) -> Iterator[tuple[DeviceBatch, dict[str, int]]]:
    """Yields each batch on the devices, with the state from which training resumes right after it.

    The state belongs to the yielded batch, while the iterator itself runs `size` batches ahead. So a checkpoint that
    stores this state continues with the first batch that was not trained on.

    Args:
        batches: the batches to move. With several hosts, these are this host's rows of each batch, and must be the
            rows that `sharding` gives to its devices (a mesh over `jax.devices()` in their order).
        sharding: sharding of the batch axis, such as NamedSharding(mesh, PartitionSpec("data")).
        size: number of batches kept ready; 0 moves each batch when it is requested.

    Yields:
        (batch, state): global arrays, and the value of `batches.get_state()` right after that batch.
    """
    ready: collections.deque[tuple[DeviceBatch, dict[str, int]]] = collections.deque()
    for batch in batches:
        state = batches.get_state()
        on_device = {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
        ready.append((on_device, state))
        if len(ready) > size:
            yield ready.popleft()
    yield from ready


def worker_count(num_workers: int | None) -> int:
    """Returns the number of worker processes to start; None means one per core, at most `MOST_WORKERS`."""
    return min(available_cores(), MOST_WORKERS) if num_workers is None else num_workers


def available_cores() -> int:
    """Returns the number of cores that this process may use; on a cluster often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _grain() -> Any:
    return optional_package("grain", purpose="loading batches")


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size={batch_size} must be a positive multiple of the {process_count} host(s).")
    return batch_size // process_count


def _start(batches: Any, config: DataConfig) -> Any:
    """Starts Grain's threads, in this process or in worker processes, and returns the iterator over batches."""
    grain = _grain()
    # Registered again each time: exit handlers run last to first, and this one must run before multiprocessing's.
    atexit.unregister(_close_running)
    atexit.register(_close_running)
    # Each thread makes whole batches, so one batch in progress per thread keeps the cores busy.
    read_options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.num_threads)
    dataset = batches.to_iter_dataset(read_options, allow_nones=False)
    if num_workers := worker_count(config.num_workers):
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; a notebook, test or library user parses none
            flags.FLAGS.mark_as_parsed()
        # Python's resource tracker warns of the memory of a worker that was killed, after our last line.
        if (quiet := "ignore:resource_tracker:UserWarning") not in sys.warnoptions:
            sys.warnoptions.append(quiet)  # inherited by the tracker's process
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_set_up_worker)
    return iter(dataset)


def _first(iterator: Any) -> Batch:
    """Returns the first batch, for which Grain starts its worker processes.

    Signals are blocked meanwhile, and Grain's threads and processes inherit that: Ctrl-C or a cluster's SIGTERM would
    end a process that has not reached `_set_up_worker` yet.

    Raises:
        RunError: a process ended while it started: Python then waits forever to send it the rest of its data.
    """
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            answer.put((next(iterator), None))
        except BaseException as error:
            answer.put((None, error))

    before, seen = _ended_child(), 0
    threading.Thread(target=ask, name="first-batch", daemon=True).start()
    while True:
        try:
            batch, error = answer.get(timeout=1.0)
        except queue.Empty:
            ended = _ended_child()
            seen = seen + 1 if ended is not None and ended != before else 0
            if ended is not None and seen == ENDED_SECONDS:  # Grain monitors those that have started
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(iterator))  # deletion would wait for the hanging threads
                problem = RunError(_worker_ended(ended[1]))
                problem.at_once = True
                raise problem from None
            continue
        if error is not None:
            raise error
        return batch


def _ended_child() -> tuple[int, int] | None:
    """Returns id and exit code of a child process that has ended and whose status was not read yet."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (AttributeError, ChildProcessError):  # on Windows; without a child process
        return None
    if found is None:
        return None
    return found.si_pid, found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _worker_ended(exit_code: int) -> str:
    """Describes the most likely reason why a worker process ended."""
    remedy = "pass --config.data.num_workers=0, or fewer workers. Then start the same command again."
    if exit_code == -signal.SIGBUS:
        size = f" of {shutil.disk_usage('/dev/shm').total / 2**20:.0f} MiB" if os.path.isdir("/dev/shm") else ""
        return (
            f"the shared memory /dev/shm{size} is too small for the batches of the data workers; give the container "
            f"more (docker run --shm-size=8g), or {remedy}"
        )
    if exit_code == -signal.SIGKILL:
        return f"a data worker was killed, most likely because the memory ran out; give more memory, or {remedy}"
    return f"a data worker ended with exit code {exit_code}; if it was not stopped on purpose, {remedy}"


def _close_running() -> None:
    # The interpreter would delete Grain's iterators after the modules they use, which leaks shared memory.
    for batches in list(_running):
        batches.close()


def _set_up_worker(worker: int, num_workers: int) -> None:
    """Runs first in every worker process, so that only the parent decides when its workers end.

    Ctrl-C and a cluster's SIGTERM reach the whole process group; a worker that ended on them would fail the parent's
    next batch while the parent is saving its last checkpoint.
    """
    del worker, num_workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A parent that was killed cannot stop its workers, and Grain's would wait forever.
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)
