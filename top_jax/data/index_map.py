"""Which example stands where in the stream: a grain dataset of other indices.

Only for `top_jax.data.pipeline`, which loads it where it needs Grain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grain


class IndexMap(grain.MapDataset):
    """Elements of `parent` in another order or number, the same in every epoch of it.

    Epoch e of the parent, of whatever was shuffled anew for it, gives epoch e of this, as in grain's own slices.
    """

    _MUTATES_ELEMENT_SPEC = False  # grain may take the parent's word for what an element is

    def __init__(self, parent: grain.MapDataset, length: int, to_parent: Callable[[int], int]):
        """Places 0 .. length - 1 of an epoch hold the parent's elements `to_parent(place)`; it must be picklable."""
        super().__init__(parent)
        self._length = length
        self._to_parent = to_parent

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._length)
        [parent] = self.parents
        return parent[epoch * len(parent) + self._to_parent(place)]


def repeat_each(parent: grain.MapDataset, repeats: int, length: int) -> IndexMap:
    """Each element `repeats` times in a row; an epoch ends after `length` of them, at most len(parent) * repeats."""
    return IndexMap(parent, length, functools.partial(_first_of_copies, repeats=repeats))


def host_share(parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int) -> IndexMap:
    """The rows of one of several hosts: of every batch of `batch_size`, the contiguous rows that its devices hold.

    `batch_size` divides len(parent), and `process_count` divides `batch_size`.
    """
    local_size = batch_size // process_count
    to_parent = functools.partial(
        _row_of_host, batch_size=batch_size, local_size=local_size, first=process_index * local_size
    )
    return IndexMap(parent, len(parent) // process_count, to_parent)


def _first_of_copies(place: int, *, repeats: int) -> int:
    return place // repeats


def _row_of_host(place: int, *, batch_size: int, local_size: int, first: int) -> int:
    batch, row = divmod(place, local_size)
    return batch * batch_size + first + row
