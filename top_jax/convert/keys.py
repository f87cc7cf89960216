"""Which official key holds which of our parameters, and how its axes turn."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

Path = tuple[str | int, ...]


LARGEST_COUNT: Final = 2**24  # the largest up to which float32 holds every whole number


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a PyTorch array becomes ours: a permutation of its axes, after dropping a unit axis.

    Attributes:
        axes: PyTorch's axes in our order.
        unit_axis: an axis of size 1 that PyTorch has and we do not, or None.
        count: an int64 in PyTorch and a float32 with us (`BatchNorm.num_batches` says why), exact up to LARGEST_COUNT.
        meaning: the axes in words, for a report; empty where they stay.
    """

    axes: tuple[int, ...] | None = None
    unit_axis: int | None = None
    count: bool = False
    meaning: str = ""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Turns a PyTorch array."""
        if self.count:
            array = array.astype(np.float32)
        if self.unit_axis is not None:
            array = np.squeeze(array, self.unit_axis)
        return array if self.axes is None else np.transpose(array, self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.count:
            array = np.asarray(np.rint(array)).astype(np.int64)  # an average of counts (EMA) need not be whole
        array = array if self.axes is None else np.transpose(array, np.argsort(self.axes))
        return array if self.unit_axis is None else np.expand_dims(array, self.unit_axis)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """PyTorch's shape for our `shape`."""
        return self.to_torch(np.broadcast_to(np.float32(0), shape)).shape  # a view: nothing is allocated


SAME: Final = Layout()
LINEAR: Final = Layout(axes=(1, 0), meaning="[out, in] -> [in, out]")
CONV2D: Final = Layout(axes=(2, 3, 1, 0), meaning="[out, in, h, w] -> [h, w, in, out]")
DEPTHWISE_CONV2D: Final = Layout(axes=(1, 2, 0), unit_axis=1, meaning="[E, 1, h, w] -> [h, w, E]")
DEPTHWISE_CONV1D: Final = Layout(axes=(1, 0), unit_axis=1, meaning="[E, 1, taps] -> [taps, E]")
COUNT: Final = Layout(count=True)


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter in both worlds."""

    torch: str
    ours: Path
    layout: Layout
