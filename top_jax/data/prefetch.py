"""Moves batches to the devices ahead of the step that uses them."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import jax

from top_jax.data.pipeline import Batches

DeviceBatch = dict[str, jax.Array]


def prefetch_to_device(
    batches: Batches, sharding: jax.sharding.Sharding, size: int = 2
) -> Iterator[tuple[DeviceBatch, dict[str, int]]]:
    """Yields each batch on the devices, with the state to resume right after it.

    The state belongs to the yielded batch, while the iterator itself runs `size` batches ahead: a checkpoint
    that stores it continues with the first batch that was not trained on.

    Args:
        batches: what to move; on several hosts, this host's rows of each batch, which must be those that
            `sharding` gives to its devices (a mesh over `jax.devices()` in their order).
        sharding: of the batch axis, such as NamedSharding(mesh, PartitionSpec("data")).
        size: batches kept ready; 0 moves each when it is asked for.

    Yields:
        (batch, state): global arrays as in `Batch` (index becomes int32 unless JAX runs in 64 bits), and what
        `batches.get_state()` was right after that batch.
    """
    ready: collections.deque[tuple[DeviceBatch, dict[str, int]]] = collections.deque()
    for batch in batches:
        state = batches.get_state()
        on_device = {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
        ready.append((on_device, state))
        if len(ready) > size:
            yield ready.popleft()
    yield from ready
