"""The floor, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from top_jax.benchmark import floor
from top_jax.benchmark.floor import Ceilings, Work, floor_of, measure_ceilings, scan_work
from top_jax.benchmark.scans import VIM_SMALL, ScanCase, make_arrays
from top_jax.benchmark.timing import Rounds

# About an H200's copy bandwidth and clock: round numbers to calculate with, not measured by this code.
H200_LIKE = Ceilings(4.3e12, 132, 1.98e9, "by hand")


def work(case, gradient):
    return scan_work(jax.eval_shape(lambda: make_arrays(case, 0)), gradient=gradient)


def test_vim_small():
    """B 128, L 197, E 768, N 16: 19,365,888 channels of tokens, each 2 bytes in u, delta and y."""
    case = VIM_SMALL.scan("bfloat16")
    read = 2 * 38_731_776 + 2 * 806_912 + 49_152 + 2 * 3_072
    assert work(case, False) == Work(read + 38_731_776, 309_854_208)
    assert work(case, True) == Work(3 * read + 2 * 38_731_776, 619_708_416)


def test_orders_are_read_and_have_no_gradient():
    case = ScanCase("x", 3, 2, 1, directions=4, dtype="float32", batch=1)
    arrays = make_arrays(case, 0)
    floats = 4 * (6 + 6 + 2 + 4 * 3 + 3 + 2 + 2 + 6)  # u, delta, A, B for each direction, C, D, delta_bias, z
    assert arrays["order"].shape == (4, 1, 3)
    assert scan_work(arrays, gradient=False) == Work(floats + 4 * 12 + 24, 24)
    assert scan_work(arrays, gradient=True) == Work(3 * floats + 2 * (4 * 12 + 24), 48)


def test_the_larger_time_is_the_floor():
    assert H200_LIKE.exponentials == pytest.approx(4.18176e12)
    found = floor_of(Work(235_728_896, 619_708_416), H200_LIKE)
    assert found == {"floor_ms": 0.1482, "floor_is": "exponentials", "bytes_ms": 0.0548, "exponentials_ms": 0.1482}
    assert floor_of(Work(4_300_000_000, 1), H200_LIKE)["floor_ms"] == 1.0
    assert floor_of(Work(4_300_000_000, 1), H200_LIKE)["floor_is"] == "bytes"


@pytest.mark.parametrize("unknown", ["bandwidth", "multiprocessors", "clock"])
def test_no_floor_where_a_ceiling_is_unknown(unknown):
    assert floor_of(Work(1, 1), H200_LIKE._replace(**{unknown: None})) == {"floor_ms": None, "floor_is": None}


def test_ceilings(h200):
    rounds = Rounds(1, 1.0, 0.0)
    found = measure_ceilings(h200, {"clocks.max.sm": "1980"}, rounds, copy_bytes=4096)
    assert found[1:] == (132, 1.98e9, "nvidia-smi clocks.max.sm, 1980 MHz")
    assert found.bandwidth is not None and found.bandwidth > 0
    row = found.row()
    assert row["exponentials"] == found.exponentials == 132 * 1.98e9 * 16
    assert row["bandwidth"] > 0 and row["dispatch_us"] > 0 and "error" not in row
    blind = measure_ceilings(h200, {"problem": "nvidia-smi is not there"}, rounds, copy_bytes=4096)
    assert blind.exponentials is None and blind.clock_source == "unknown: nvidia-smi is not there"
    assert "nvidia-smi is not there" in blind.row()["error"]


def test_a_cpu_has_no_ceilings():
    assert measure_ceilings(jax.devices()[0], {}, Rounds(1, 1.0, 0.0)) == Ceilings(clock_source="no GPU")


def test_copy_counts_read_and_written(monkeypatch):
    from top_jax.benchmark.timing import Timing

    seen = []

    def fake_time(runs, rounds):
        seen.extend(jnp.asarray(run(0)).nbytes for run in runs.values())
        return {"copy": Timing((2.0,)), "negate": Timing((1.0,))}

    monkeypatch.setattr(floor, "time_in_turn", fake_time)
    assert floor.copy_bandwidth(4096, Rounds(1, 1.0, 0.0)) == 8192.0
    assert seen == [4096, 4096]
