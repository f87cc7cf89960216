"""How arrays lie on the devices: images split over all of them, weights whole on each or in parts (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from top_jax.errors import InputError

SMALLEST_PART: Final = 1024  # numbers; an array whose parts would be smaller is kept whole: it costs nothing


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes, in the axes "data" and "fsdp".

    Each group of `fsdp` neighbours holds one copy of the weights between them. The devices of a process are
    neighbours, so that its rows of a batch are.

    Raises:
        InputError: `fsdp` does not divide the number of devices.
    """
    devices = in_order(jax.devices())
    if len(devices) % fsdp:
        count = f"{len(devices)} device{'s' * (len(devices) > 1)}"
        raise InputError(f"fsdp={fsdp} does not divide the {count}; use a divisor of {len(devices)}.")
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Those of a process side by side, which by their numbers they need not be (a host of a TPU pod owns a square)."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def by_image(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis over all devices: a batch."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def in_parts(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A sharding for each array of weights, or of what an optimizer keeps about them.

    The longest axis that the "fsdp" devices divide evenly is split over them. An array without one, or whose parts
    would be tiny, is whole on every device; so is all of it where fsdp is 1.

    Args:
        mesh: of `make_mesh`.
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
    """Raises InputError unless `size` images split evenly over the devices, each share into `parts`."""
    devices = len(jax.devices())
    if size < 1 or size % (devices * parts):
        micro = f" times {parts} micro-batches" if parts > 1 else ""
        raise InputError(
            f"{name}={size} is not divisible by {devices} device{'s' * (devices > 1)}{micro}; use a multiple of "
            f"{devices * parts}."
        )
