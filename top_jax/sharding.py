"""Layouts of arrays over devices: images are split over all of them; weights are replicated, or split (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from top_jax.errors import InputError

SMALLEST_PART: Final = 1024  # values; an array whose parts would be smaller is replicated, which costs little memory


def make_mesh(fsdp: int = 1) -> Mesh:
    """Arranges all devices of all processes along the axes "data" and "fsdp".

    Each group of `fsdp` neighbours shares one copy of the weights. The devices of a process are neighbours, and so are
    its rows of a batch.

    Raises:
        InputError: `fsdp` does not divide the number of devices.
    """
    devices = in_order(jax.devices())
    if len(devices) % fsdp:
        count = f"{len(devices)} device{'s' * (len(devices) > 1)}"
        raise InputError(f"fsdp={fsdp} does not divide the {count}; use a divisor of {len(devices)}.")
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Sorts devices by process; the ids alone can interleave processes (a host of a TPU pod owns a square)."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def by_image(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def in_parts(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Returns a sharding for each array of weights, or of an optimizer's state.

    The longest axis that the "fsdp" devices divide evenly is split over them. An array without such an axis, or with
    tiny parts (`SMALLEST_PART`), is whole on every device, and so are all arrays if fsdp is 1.

    Args:
        mesh: from `make_mesh`.
        tree: arrays, or their shapes.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or leaf.size < parts * SMALLEST_PART:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(place, tree)


def check_divisible(name: str, size: int, parts: int = 1) -> None:
    """Raises InputError unless `size` images split evenly over the devices, and each device's share into `parts`."""
    devices = len(jax.devices())
    if size < 1 or size % (devices * parts):
        micro = f" times {parts} micro-batches" if parts > 1 else ""
        raise InputError(
            f"{name}={size} is not divisible by {devices} device{'s' * (devices > 1)}{micro}; use a multiple of "
            f"{devices * parts}."
        )
