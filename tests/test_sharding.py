"""Where arrays lie: by rule, for any number of devices."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from top_jax import sharding
from top_jax.errors import InputError


def specs(fsdp, **shapes):
    mesh = AbstractMesh((8 // fsdp, fsdp), ("data", "fsdp"))
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {name: found.spec for name, found in sharding.in_parts(mesh, tree).items()}


def test_weights_in_parts():
    """The longest axis that divides; small arrays, and those without such an axis, stay whole."""
    found = specs(4, wide=(192, 768), tall=(4096, 3), odd=(63, 127), bias=(768,), conv=(7, 7, 1, 1024), scalar=())
    assert found == {
        "wide": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp"),
        "odd": PartitionSpec(),
        "bias": PartitionSpec(),
        "conv": PartitionSpec(None, None, None, "fsdp"),
        "scalar": PartitionSpec(),
    }


def test_one_part_is_the_whole():
    assert set(specs(1, wide=(192, 768), bias=(768,)).values()) == {PartitionSpec()}


def test_the_devices_of_a_process_are_neighbours():
    """Their numbers need not be: a host of a TPU pod owns a square of chips."""
    places = [(0, 0), (1, 1), (0, 2), (1, 3)]
    devices = [types.SimpleNamespace(process_index=process, id=number) for process, number in places]
    assert sharding.in_order(devices) == [devices[0], devices[2], devices[1], devices[3]]


def test_parts_that_do_not_divide():
    with pytest.raises(InputError, match="fsdp=3 .* 1 device"):
        sharding.make_mesh(fsdp=3)
