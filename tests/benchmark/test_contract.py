"""The contract on the device at hand finds what is wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.benchmark.contract import FULL, TINY, check_contract, compare, relative_error


@pytest.mark.slow
def test_a_right_implementation():
    (row,) = check_contract("pallas_interpret", TINY[:1])
    assert "error" not in row
    assert row["bit_equal"] and row["value_error"] < 1e-5 and row["gradient_error"] < 5e-5


def test_one_that_cannot_run():
    (row,) = check_contract("triton", TINY[:1])
    assert row["error"].startswith("InputError: ") and "triton" in row["error"]


ONES, TWO = np.ones(3, np.float32), np.ones(2, np.float32)


def output(y, u, score=None):
    return (y, score), {"u": u}


@pytest.mark.parametrize(
    "got, error",
    [
        (output(ONES * (1 + 1e-4), ONES, TWO), "value error 1.0e-04 is over 1.0e-05"),
        (output(ONES, ONES, TWO * 0.9), "value error 1.0e-01 is over 1.0e-05"),
        (output(ONES, ONES * 1.01, TWO), "gradient error 1.0e-02 is over 5.0e-05"),
        (output(np.array([1, np.nan, 1], np.float32), ONES, TWO), "value error inf is over 1.0e-05"),
    ],
)
def test_what_is_wrong_is_said(got, error):
    row = compare("float32", got, [got], output(jnp.ones(3), jnp.ones(3), jnp.ones(2)))
    assert row["error"] == error and row["worst_gradient"] == "u"


def test_runs_that_differ():
    """The last of three."""
    ones = jnp.ones(3)
    row = compare("float32", output(ones, ones), [output(ones, ones), output(ones + 1e-7, ones)], output(ones, ones))
    assert row["error"] == "runs differ" and not row["bit_equal"]


def test_relative_error():
    assert relative_error([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert relative_error([1.0], [1.0, 1.0]) == float("inf")


def test_what_is_covered():
    """Every alignment, dtype, number of directions and score; one token; sizes around and beyond a block."""
    assert {case.decay for case in FULL} == {case.backwards for case in FULL} == {False, True}
    assert {case.gated for case in FULL} == {case.reorder_parameters for case in FULL} == {False, True}
    assert {case.directions for case in FULL} == {1, 2, 4}
    assert {case.dtype for case in FULL} == {"float32", "bfloat16"}
    assert {case.score for case in FULL} == {None, "clip", "noclip", "l1", "l2"}
    assert {1, 197} <= {case.length for case in FULL} and 1 in {case.width for case in FULL}
