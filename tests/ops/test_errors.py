"""Arguments that the scan rejects, with the offending value in the message."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from top_jax.errors import InputError
from top_jax.ops import selective_scan
from top_jax.ops.selective_scan import gaps

BATCH, LENGTH, WIDTH, STATES = 2, 4, 3, 5


@pytest.fixture
def inputs(make_inputs):
    return make_inputs(BATCH, LENGTH, WIDTH, STATES)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "name, shape, needed",
    [
        ("delta", (BATCH, LENGTH + 1, WIDTH), "(2, 4, 3)"),
        ("A", (WIDTH + 1, STATES), "(3, 5)"),
        ("B", (BATCH, STATES, LENGTH), "(2, 4, 5)"),  # PyTorch's order
        ("C", (1, LENGTH, STATES), "(2, 4, 5)"),
        ("D", (1,), "(3,)"),
        ("z", (BATCH, WIDTH, LENGTH), "(2, 4, 3)"),
        ("delta_bias", (WIDTH, 1), "(3,)"),
    ],
)
def test_shapes(inputs, name, shape, needed):
    with pytest.raises(InputError) as error:
        selective_scan(**{**inputs, name: jax.device_put(np.ones(shape, np.float32))})
    message = str(error.value)
    assert message.startswith(name) and str(shape) in message and needed in message


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name, shape", [("u", (LENGTH, WIDTH)), ("A", (WIDTH,))])
def test_ranks(inputs, name, shape):
    with pytest.raises(InputError, match=re.escape(str(shape))):
        selective_scan(**{**inputs, name: jax.device_put(np.ones(shape, np.float32))})


def test_no_token(make_inputs):
    with pytest.raises(InputError, match="L=0"):
        selective_scan(**make_inputs(2, 0, 3, 5))


def test_unknown_names(inputs):
    with pytest.raises(InputError, match="alignment='held'.*none, hold, decay"):
        selective_scan(**inputs, alignment="held")
    with pytest.raises(InputError, match="implementation='cuda'.*auto, reference, xla"):
        selective_scan(**inputs, implementation="cuda")


def test_decay_needs_positions(inputs):
    with pytest.raises(InputError, match="alignment='decay'"):
        selective_scan(**inputs, alignment="decay")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "positions",
    [
        jax.device_put(np.arange(LENGTH, dtype=np.int32)),
        jax.device_put(np.tile(np.arange(LENGTH + 1, dtype=np.int32), (BATCH, 1))),
        jax.device_put(np.ones((BATCH, LENGTH), np.float32)),
    ],
)
def test_positions_of_another_kind(inputs, positions):
    with pytest.raises(InputError, match=r"positions.*int32\[2, 4\]"):
        selective_scan(**inputs, positions=positions)


def bad_positions() -> jax.Array:
    return jnp.asarray([[0, 1, 2, 3], [0, 5, 5, 6]], jnp.int32)


@pytest.mark.parametrize("alignment", ["none", "hold", "decay"])
def test_positions_that_do_not_increase(inputs, alignment):
    with pytest.raises(InputError, match="positions of image 1 .* 5 .* 5 .* token 2"):
        selective_scan(**inputs, positions=bad_positions(), alignment=alignment)


def test_traced_positions_are_checked_under_checkify(inputs):
    scan = jax.jit(lambda positions: selective_scan(**inputs, positions=positions, alignment="decay"))
    checked = checkify.checkify(scan, errors=checkify.user_checks)
    error, _ = checked(bad_positions())
    assert "positions" in error.get()
    error, _ = checked(jnp.asarray([[0, 1, 2, 3], [0, 5, 6, 9]], jnp.int32))
    assert error.get() is None


def test_traced_positions_are_not_checked_under_plain_jit(inputs):
    scan = jax.jit(lambda positions: selective_scan(**inputs, positions=positions, alignment="hold"))
    np.testing.assert_array_equal(scan(bad_positions()), jax.jit(lambda: selective_scan(**inputs))())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "change, values",
    [
        ({"u": [[1.0]]}, r"u=\[\[1.0\]\]"),
        ({"delta": None}, "delta=None"),
        ({"B": np.ones((BATCH, LENGTH, STATES))}, "B .* float64; .*float32, bfloat16, float16"),
        ({"z": jax.device_put(np.ones((BATCH, LENGTH, WIDTH), np.int32))}, "z .* int32"),
        ({"reverse": "yes"}, "reverse .* 'yes'"),
        ({"reverse": [True]}, r"reverse .* \[True\]"),
        ({"implementation": None}, "implementation=None"),
        ({"positions": [0, 1]}, r"positions=\[0, 1\]; .* int32\[2, 4\]"),
        ({"positions": np.array([[3, 2, 1, 0]] * BATCH, np.uint8)}, r"positions .* uint8\[2, 4\]; .* int32"),
    ],
)
def test_what_only_looks_right(inputs, change, values):
    with pytest.raises(InputError, match=values):
        selective_scan(**{**inputs, **change})


def test_positions_far_apart_are_fine(inputs):
    far = jnp.asarray([[-(2**31), -1, 0, 2**31 - 1]] * BATCH, jnp.int32)
    jax.jit(lambda: selective_scan(**inputs, positions=far, alignment="hold"))()  # checked, for they are no tracers
    # The places between neighbours are counted even where their difference is no int32.
    ends = jnp.asarray([[[-(2**31), 2**31 - 2, 2**31 - 1]]], jnp.int32)
    both = jax.jit(lambda ends: gaps(ends, (False, True)))(ends)
    np.testing.assert_array_equal(np.asarray(both)[:, 0], np.float32([[0, 2**32 - 3, 0], [2**32 - 3, 0, 0]]))


@pytest.mark.parametrize("sizes", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)])
def test_nothing_to_scan(sizes, make_inputs):
    with pytest.raises(InputError, match="=0"):
        selective_scan(**make_inputs(*sizes))
