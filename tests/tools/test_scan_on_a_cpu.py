"""The benchmark compares programs that compute the same thing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import scan_on_a_cpu as bench
from top_jax.benchmark.timing import Rounds

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


@pytest.fixture(scope="module")
def arrays():
    return bench.inputs_like_a_model(batch=2, length=11, width=3, states=4)


def assert_close(got, want):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_rows_in_jax_agree(arrays):
    inputs, A, _ = arrays
    want = jit(bench.plain)(inputs, A)
    assert np.abs(want).max() > 0.1
    assert_close(jit(bench.ours)(inputs, A), want)
    assert_close(jit(bench.associative)(inputs, A), want)
    assert_close(jit(bench.our_gradient)(*arrays), jit(bench.autodiff(bench.plain))(*arrays))


@pytest.mark.torch
def test_the_torch_loop_agrees(arrays):
    inputs, A, _ = arrays
    y = bench.torch_loop(*bench.torch_inputs(inputs, A)).detach().numpy()
    assert_close(jnp.moveaxis(jnp.asarray(y), -1, 0), jit(bench.plain)(inputs, A))


def test_without_torch_the_table_says_so(arrays, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    (row,) = bench.measure_torch(*arrays, Rounds(most=1, seconds=0, measurement=0))
    assert row == {"name": "torch loop", "absent": "PyTorch is not installed"}


def test_growth_is_the_time_per_token():
    assert bench.relative_to_linear({2: 1.0, 4: 2.0, 8: 6.0}) == {"2": 1.0, "4": 1.0, "8": 1.5}


@pytest.mark.slow
def test_growth():
    lines = bench.growth(1, [4, 2, 4], 2, 2, Rounds(most=1, seconds=0, measurement=0))
    assert [list(line["of_linear"]) for line in lines] == [["2", "4"]] * 2
    assert [line["pass"] for line in lines] == ["forward", "forward and gradients"]
