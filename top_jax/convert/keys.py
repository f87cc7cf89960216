"""Which official key holds which of our parameters, and how its axes turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
DEPTHWISE_CONV1D: Final = Layout(axes=(1, 0), unit_axis=1)  # [E, 1, taps] -> [taps, E]


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter in both worlds."""

    torch: str
    ours: Path
    layout: Layout


def vim_keys(depth: int) -> list[Key]:
    """Every parameter of an official ViM checkpoint (hustvl/Vim, bimamba_type="v2")."""
    return [
        Key("cls_token", ("cls_token",), SAME),
        Key("pos_embed", ("pos_embed",), SAME),
        Key("patch_embed.proj.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key("patch_embed.proj.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(depth) for key in _vim_block(index)),
        Key("norm_f.weight", ("norm", "scale"), SAME),
        Key("head.weight", ("head", "kernel"), LINEAR),
        Key("head.bias", ("head", "bias"), SAME),
    ]


def _vim_block(index: int) -> Iterator[Key]:
    block, mixer = f"layers.{index}", f"layers.{index}.mixer"
    ours: Path = ("blocks", index, "mixer")
    yield Key(f"{block}.norm.weight", ("blocks", index, "norm", "scale"), SAME)
    yield Key(f"{mixer}.in_proj.weight", (*ours, "in_proj", "kernel"), LINEAR)
    yield Key(f"{mixer}.out_proj.weight", (*ours, "out_proj", "kernel"), LINEAR)
    for direction, suffix in (("forward", ""), ("backward", "_b")):
        here: Path = (*ours, direction)
        yield Key(f"{mixer}.conv1d{suffix}.weight", (*here, "conv_kernel"), DEPTHWISE_CONV1D)
        yield Key(f"{mixer}.conv1d{suffix}.bias", (*here, "conv_bias"), SAME)
        yield Key(f"{mixer}.x_proj{suffix}.weight", (*here, "x_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.weight", (*here, "dt_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.bias", (*here, "dt_bias"), SAME)
        yield Key(f"{mixer}.A{suffix}_log", (*here, "A_log"), SAME)
        yield Key(f"{mixer}.D{suffix}", (*here, "D"), SAME)
