"""Repeats examples and shares them among hosts, as Grain datasets with other indices.

Only for `top_jax.data.pipeline`, which imports this file when it needs Grain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grain


class IndexMap(grain.MapDataset):
    """The elements of `parent` in another order or number, by one rule for every epoch.

    Epoch e of this dataset takes its elements from epoch e of the parent, shuffled for that epoch, as Grain's own
    slices do.
    """

    _MUTATES_ELEMENT_SPEC = False  # Grain may rely on the parent's element spec

    def __init__(self, parent: grain.MapDataset, length: int, to_parent: Callable[[int], int]):
        """Takes a picklable `to_parent`: element i of an epoch, 0 <= i < length, is the parent's `to_parent(i)`."""
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
    """Repeats each element `repeats` times in a row; an epoch has `length` elements, at most len(parent) * repeats."""
    return IndexMap(parent, length, functools.partial(_first_of_copies, repeats=repeats))


def host_share(parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int) -> IndexMap:
    """Selects the rows of one host: the contiguous rows of every batch of `batch_size` that its devices hold.

    `batch_size` must divide len(parent), and `process_count` must divide `batch_size`.
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
