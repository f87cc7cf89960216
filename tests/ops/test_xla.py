"""The chunked recurrence: chunk sizes and directions, which the contract suite does not vary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.ops.xla import Steps, chunked_scan_backward, chunked_scan_forward, scan_forward

LENGTH, BATCH, WIDTH, STATES = 11, 2, 3, 4


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(rng.normal(size=(LENGTH, BATCH, *shape)).astype(np.float32))  # noqa: E731
    inputs = Steps(tau=jnp.abs(draw(WIDTH)), x=draw(WIDTH), B=draw(STATES), C=draw(STATES))
    A = -jax.device_put(rng.uniform(0.1, 2, size=(STATES, WIDTH)).astype(np.float32))
    return inputs, A, draw(WIDTH)


@functools.partial(
    jax.jit,
    static_argnames=("reverse", "longest_chunk"),
    compiler_options={"xla_backend_optimization_level": 0},  # compiles faster, runs slower
)
def run(inputs, A, dy, *, reverse, **chunk):
    y, starts = chunked_scan_forward(inputs, A, reverse=reverse, **chunk)
    return y, starts, chunked_scan_backward(inputs, A, starts, dy, reverse=reverse)


def assert_close(got, want):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_change_no_number(arrays, reverse):
    want_y, _, want = run(*arrays, reverse=reverse, longest_chunk=6)
    for longest, chunks in ((1, 11), (4, 3), (100, 1)):
        y, starts, grads = run(*arrays, reverse=reverse, longest_chunk=longest)
        assert starts.shape == (chunks, BATCH, STATES, WIDTH)
        assert_close((y, grads), (want_y, want))


@pytest.mark.parametrize("reverse", [False, True])
def test_forward_without_states(arrays, reverse):
    inputs, A, dy = arrays
    assert_close(scan_forward(inputs, A, reverse=reverse), run(inputs, A, dy, reverse=reverse)[0])


def test_reverse_is_flipped(arrays):
    inputs, A, dy = arrays
    flip = functools.partial(jax.tree.map, lambda a: a[::-1])
    y, _, (grads, dA) = run(inputs, A, dy, reverse=True)
    want_y, _, (want, want_dA) = run(flip(inputs), A, dy[::-1], reverse=False)
    assert_close((y, grads, dA), (want_y[::-1], flip(want), want_dA))
    assert np.abs(y - want_y).max() > 0.1


def test_products_ask_for_full_float32(arrays):
    # The default is TF32 on a GPU and bfloat16 on a TPU, which no test on a CPU would see.
    program = run.lower(*arrays, reverse=False).as_text()
    assert 0 < program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]")
