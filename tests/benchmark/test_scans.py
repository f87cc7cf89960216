"""What is timed computes the scan, and rows say what they are."""

import dataclasses

import jax
import numpy as np
import pytest

from top_jax.benchmark.contract import TINY, relative_error
from top_jax.benchmark.floor import Ceilings
from top_jax.benchmark.scans import (
    APART,
    STATES_KEPT,
    ScanCase,
    input_sets,
    make_arrays,
    make_cotangent,
    scan_of,
    time_scans,
    with_gradients,
)
from top_jax.benchmark.timing import Rounds

FAST = {"xla_backend_optimization_level": 0}
BRIEF = Rounds(1, 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        TINY[1],
        pytest.param(TINY[2], marks=pytest.mark.slow),
        TINY[3],
        pytest.param(dataclasses.replace(TINY[3], reorder_parameters=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_associative_is_the_same_scan(case):
    arrays, dy = make_arrays(case, 0), make_cotangent(case, 0)
    got, want = (
        jax.jit(with_gradients(scan_of(case, name)), compiler_options=FAST)(arrays, dy)
        for name in ("associative", "reference")
    )
    assert relative_error(got[0][0], want[0][0]) < 1e-5
    assert got[1].keys() == want[1].keys() == arrays.keys() - {"positions", "order"}
    assert max(relative_error(got[1][name], want[1][name]) for name in want[1]) < 5e-5


def test_rows():
    case = ScanCase("small", 3, 2, 1, directions=1, dtype="float32", batch=1)
    rows = time_scans(case, ("xla", "associative", "triton"), Ceilings(1.0, 1, 1e9, ""), BRIEF, memory=2**20)
    assert [(row["implementation"], row["pass"]) for row in rows] == [
        (name, which) for which in ("forward", "forward+backward") for name in ("xla", "associative", "triton")
    ]
    for row in rows:
        assert (row["case"], row["length"], row["dtype"], row["decay"]) == ("small", 3, "float32", False)
        if row["implementation"] == "triton":
            assert row["error"].startswith("InputError: ") and "triton" in row["error"]
        else:
            assert row["floor_is"] == "bytes"
            assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"], abs=0.01)


def test_associative_is_not_tried_where_it_does_not_fit():
    case = ScanCase("small", 3, 2, 1, directions=2, dtype="float32", batch=1)
    needed = STATES_KEPT * 3 * 2 * 4  # one direction after the other forward, both kept for the gradient
    rows = time_scans(case, ("associative",), Ceilings(), BRIEF, memory=needed)
    assert "median_ms" in rows[0] and rows[0]["floor_ms"] is None
    assert "GiB" in rows[1]["absent"] and "median_ms" not in rows[1]


def test_input_sets_differ():
    case = ScanCase("small", 3, 2, 1, batch=1)
    (first, dy), (second, other), *rest = input_sets(case, rotate=True)
    assert len(rest) == 4 and len(input_sets(case, rotate=False)) == 1
    assert (np.asarray(first["u"]) != np.asarray(second["u"])).any() and (np.asarray(dy) != np.asarray(other)).any()


@pytest.mark.slow
def test_one_call_each_is_both_directions_at_once():
    case = ScanCase("small", 3, 2, 1, dtype="float32", batch=2)
    arrays, dy = make_arrays(case, 0), make_cotangent(case, 0)
    apart, together = (with_gradients(scan_of(case, name))(arrays, dy) for name in (APART, "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), apart, together)
