"""Which official key holds which of our parameters, and how its axes turn."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a PyTorch array becomes ours: a permutation of its axes, after dropping a unit axis.

    Attributes:
        axes: PyTorch's axes in our order.
        unit_axis: an axis of size 1 that PyTorch has and we do not, or None.
    """

    axes: tuple[int, ...] | None = None
    unit_axis: int | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Turns a PyTorch array."""
        if self.unit_axis is not None:
            array = np.squeeze(array, self.unit_axis)
        return array if self.axes is None else np.transpose(array, self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        array = array if self.axes is None else np.transpose(array, np.argsort(self.axes))
        return array if self.unit_axis is None else np.expand_dims(array, self.unit_axis)


SAME: Final = Layout()
LINEAR: Final = Layout(axes=(1, 0))  # [out, in] -> [in, out]
CONV2D: Final = Layout(axes=(2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
DEPTHWISE_CONV2D: Final = Layout(axes=(1, 2, 0), unit_axis=1)  # [E, 1, h, w] -> [h, w, E]
DEPTHWISE_CONV1D: Final = Layout(axes=(1, 0), unit_axis=1)  # [E, 1, taps] -> [taps, E]


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter in both worlds."""

    torch: str
    ours: Path
    layout: Layout
