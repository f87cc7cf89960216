"""Batches through Grain.

Everything up to the batch is random access: batch n is a function of (source, config, seed, n) alone. So a run
resumes at batch n at once, and neither threads nor worker processes can change what it sees.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import workers
from top_jax.data.examples import DEFAULT_AUGMENT, PADDING_INDEX, ExampleReader
from top_jax.data.sources import Source
from top_jax.data.transforms import as_size
from top_jax.errors import InputError

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
"""image uint8 [B, H, W, 3], label int32 [B], mask float32 [B], index int64 [B]."""


_running: weakref.WeakSet[Batches] = weakref.WeakSet()


class Batches(Iterator[Batch]):
    """Iterates over batches; `get_state` and `set_state` move it to any batch, exactly.

    Close it, or use it as a context manager, to end its threads and worker processes early.

    Attributes:
        corrupt: for each unreadable image met so far, its index in the source and what was wrong.
    """

    def __init__(self, batches: Any, reader: ExampleReader):
        """Wraps a grain.MapDataset of batches; `train_batches` and `eval_batches` make it."""
        self.corrupt: dict[int, str] = {}
        self._batches = batches
        self._reader = reader
        self._next = 0
        self._iterator: Any = None

    def __len__(self) -> int:
        """The number of batches; sys.maxsize for training."""
        return len(self._batches)

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = _start(self._batches[self._next :], self._reader.config)
            _running.add(self)
        # Copied, since a worker's batch lies in shared memory that Grain takes back.
        batch = {name: np.array(values) for name, values in next(self._iterator).items()}
        self._next += 1
        self._note_corrupt(batch)
        return batch

    def get_state(self) -> dict[str, int]:
        """Where it stands, for JSON: the number of batches returned so far."""
        return {"batches": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called; takes no longer for a late batch than for an early one."""
        self.close()
        self._next = state["batches"]

    def close(self) -> None:
        """Ends the threads and worker processes; iterating on would start new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _note_corrupt(self, batch: Batch) -> None:
        unreadable = batch["index"][(batch["mask"] == 0) & (batch["index"] != PADDING_INDEX)]
        for index in (int(i) for i in unreadable if int(i) not in self.corrupt):
            self.corrupt[index] = self._reader.problem(index)
            logger.warning("skipped unreadable image %d: %s", len(self.corrupt), self.corrupt[index])


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
    """Endless batches of len(source) // batch_size an epoch, each epoch shuffled anew and every image augmented anew.

    The augmentation of an example is a function of the seed and its place in the stream. With several hosts, host p
    gets the rows p * B .. (p + 1) * B of every global batch, B = batch_size / process_count: one after another,
    they are what a single host would see.

    With `augment.repeats` = r the copies of an image stand in a row, and the images of an epoch are the first
    1 / r of its shuffle. That is repeated augmentation as in DeiT (samplers.py: RASampler), which gives the copies
    to different GPUs of a step, while here they meet in one global batch.

    Args:
        source: the training images.
        config: the crop, what to do with unreadable images, and how many threads and processes decode.
        augment: RandAugment, colour jitter and repeats; the rest of it is the device's (`device_augment`).
        img_size: side or (height, width) of the model's input.
        batch_size: images in a batch, over all hosts.
        seed: 0 .. 2**32 - 1.
        process_index: this host, as jax.process_index().
        process_count: the number of hosts.

    Raises:
        InputError: fewer images than a batch, a batch size not divisible by the hosts, or an impossible setting.
    """
    import grain

    from top_jax.data import index_map

    local_size = _local_batch_size(batch_size, process_count)
    reader = ExampleReader(source, config, as_size(img_size), augment)
    if len(source) < batch_size:
        raise InputError(
            f"{source.name} has {len(source)} images, fewer than batch_size={batch_size}; use a smaller batch."
        )
    kept = len(source) - len(source) % batch_size
    shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    # The order counts: what an example's augmentation is drawn from is its place among all hosts' examples.
    examples = index_map.repeat_each(shuffled, augment.repeats, kept).random_map(reader.random)
    rows = index_map.host_share(examples, batch_size, process_index, process_count)
    return Batches(rows.batch(local_size).repeat(), reader)


def eval_batches(
    source: Source,
    config: DataConfig,
    *,
    img_size: int | Sequence[int],
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every image exactly once, in order; arguments, and the rows of each host, as `train_batches`.

    All batches have the same shape: the last is filled up with rows of mask 0 and index -1.

    Raises:
        InputError: a batch size not divisible by the hosts, or an impossible setting.
    """
    import grain

    from top_jax.data import index_map

    local_size = _local_batch_size(batch_size, process_count)
    reader = ExampleReader(source, config, as_size(img_size))
    padded = -(-len(source) // batch_size) * batch_size
    examples = grain.MapDataset.range(padded).map(reader.fixed)
    rows = index_map.host_share(examples, batch_size, process_index, process_count)
    return Batches(rows.batch(local_size), reader)


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size={batch_size} must be a positive multiple of the {process_count} host(s).")
    return batch_size // process_count


def _start(batches: Any, config: DataConfig) -> Any:
    """Starts Grain's threads, in this process or in worker processes."""
    import grain

    # Registered anew, because exit handlers run last to first and ours must come before multiprocessing's.
    atexit.unregister(_close_running)
    atexit.register(_close_running)
    # Each thread makes whole batches, so one in the making for each of them is what fills the cores.
    read_options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.num_threads)
    dataset = batches.to_iter_dataset(read_options, allow_nones=False)
    if num_workers := workers.count(config.num_workers):
        workers.mark_flags_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=workers.set_up_worker)
    return iter(dataset)


def _close_running() -> None:
    # Left to the interpreter, Grain's iterators go after the modules they use and leak shared memory.
    for batches in list(_running):
        batches.close()
