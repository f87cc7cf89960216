"""How arrays lie on the devices: images split over all of them, weights on each."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from top_jax.errors import InputError


def data_parallel() -> tuple[NamedSharding, NamedSharding]:
    """Over all devices: the sharding of a batch, by image, and that of everything else, replicated."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def check_divisible(name: str, size: int, parts: int = 1) -> None:
    """Raises InputError unless `size` images split evenly over the devices, each share into `parts`."""
    devices = len(jax.devices())
    if size < 1 or size % (devices * parts):
        micro = f" times {parts} micro-batches" if parts > 1 else ""
        raise InputError(
            f"{name}={size} is not divisible by {devices} devices{micro}; use a multiple of {devices * parts}."
        )
