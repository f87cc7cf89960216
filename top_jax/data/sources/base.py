"""What every image source looks like to the pipeline."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from top_jax.errors import InputError


class Record(NamedTuple):
    """One labelled image: an encoded file, or pixels uint8 [H, W, 3]."""

    image: bytes | np.ndarray
    label: int


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images; picklable, because worker processes receive a copy."""

    @property
    def name(self) -> str:
        """What messages call it, such as "imagenet2012/train"."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """What to call each label."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """Reads image `index`; raises OSError if its bytes are lost or damaged."""
        ...

    def describe(self, index: int) -> str:
        """Where image `index` lies, for a message that names it, whether or not it can be read."""
        ...


def check_classes(source: Source, num_classes: int, advice: str) -> None:
    """Raises InputError, ending in `advice`, unless the source has as many classes as a model of `num_classes`."""
    if source.num_classes != num_classes:
        raise InputError(f"{source.name} has {source.num_classes} classes and the model {num_classes}; {advice}.")
