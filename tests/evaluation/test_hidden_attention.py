"""The hidden attention, applied to u, gives the scan's output."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.evaluation import hidden_attention as hidden
from top_jax.ops import ScanArguments, ScanPlan, directional_scan, selective_scan
from top_jax.ops.selective_scan import gaps

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes most of the time


def jitted(function):
    return quick_jit(function, static_argnames="plan")


channel_attention, hidden_attention = jitted(hidden.channel_attention), jitted(hidden.hidden_attention)
count_gaps = quick_jit(gaps, static_argnums=1)
BATCH, LENGTH, WIDTH, STATES = 2, 9, 3, 4
POSITIONS = [[0, 1, 4, 5, 9, 10, 11, 15, 20], [2, 3, 5, 6, 7, 8, 12, 13, 14]]


def scan_arguments(reverse, order=None, positions=None):
    """Returns scan arguments with short to long time steps, different in each direction."""
    directions = len(reverse)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=(directions, *shape)).astype(np.float32)  # noqa: E731
    arrays = (
        draw(BATCH, LENGTH, WIDTH),
        draw(BATCH, LENGTH, WIDTH),
        -np.exp(draw(WIDTH, STATES)),
        draw(BATCH, LENGTH, STATES),
        draw(BATCH, LENGTH, STATES),
        draw(WIDTH),
        draw(WIDTH),
    )
    gap = None if positions is None else count_gaps(positions, reverse)
    return ScanArguments(*map(jnp.asarray, arrays), gap=gap, order=order)


@pytest.mark.parametrize("alignment", ["none", "decay"])
@pytest.mark.parametrize("reverse", [False, True])
def test_alpha_times_u_is_the_scan(reverse, alignment):
    positions = np.asarray(POSITIONS, np.int32)
    scan = scan_arguments((reverse,), positions=positions[None] if alignment == "decay" else None)

    @quick_jit
    def by_the_scan(scan):
        settings = dict(alignment=alignment, reverse=reverse, implementation="reference")
        one = [array[0] for array in scan[:6]]
        return selective_scan(*one, delta_bias=scan.delta_bias[0], positions=jnp.asarray(positions), **settings)

    expected = by_the_scan(scan)
    alpha = np.asarray(channel_attention(scan, ScanPlan((reverse,))))
    u, D = np.asarray(scan.u)[0], np.asarray(scan.D)[0]
    y = np.einsum("beij,bje->bie", alpha, u) + D * u
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    unseen = np.tril(alpha, -1) if reverse else np.triu(alpha, 1)  # tokens later in the scan
    assert not unseen.any() and np.abs(alpha).sum() > 1


def test_a_gap_is_felt():
    """alpha of two tokens with a gap between them is that without a gap, times the gap's decay."""
    positions = np.asarray(POSITIONS, np.int32)
    forward = ScanPlan((False,))
    with_gaps = np.asarray(channel_attention(scan_arguments((False,), positions=positions[None]), forward))
    without = np.asarray(channel_attention(scan_arguments((False,)), forward))
    np.testing.assert_array_equal(with_gaps[:, :, :2, :2], without[:, :, :2, :2])  # the first tokens have no gap yet
    assert np.asarray(count_gaps(positions[None], (False,)))[0, 0, 2] == 2
    assert (np.abs(with_gaps[0, :, 2, :2] - without[0, :, 2, :2]) > 1e-6).all()


@pytest.mark.parametrize("reorder", [False, True])
def test_directions_with_an_order_of_their_own(reorder):
    """PlainMamba's directions are brought into the tokens' order and added, with and without its quirk."""
    rng = np.random.default_rng(1)
    order = jnp.asarray([[rng.permutation(LENGTH) for _ in range(BATCH)] for _ in range(2)], jnp.int32)
    steps = jnp.asarray(np.sort(np.stack([POSITIONS, POSITIONS[::-1]])), jnp.int32)
    settings = dict(order=order, positions=steps, reorder_parameters=reorder, reverse=(False, True))
    plan = ScanPlan(settings["reverse"], reorder)
    scan = scan_arguments(plan.reverse, order, steps)
    of = lambda arrays, bias: directional_scan(*arrays, None, bias, alignment="decay", **settings)[0]  # noqa: E731
    expected = quick_jit(of)(scan[:6], scan.delta_bias)
    # Each direction has its own u here, so each is applied separately.
    total = 0.0
    for g in range(2):
        one = jax.tree.map(lambda array, g=g: np.asarray(array)[g : g + 1], scan)
        own = ScanPlan(plan.reverse[g : g + 1], reorder)
        total += np.einsum("beij,bje->bie", channel_attention(one, own), one.u[0]) + one.D[0] * one.u[0]
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=2e-5)
    shared = scan._replace(u=np.asarray(scan.u)[:1])
    both = np.asarray(channel_attention(shared, plan))
    signed = jitted(partial(hidden.hidden_attention, absolute=False))(shared, plan)
    np.testing.assert_allclose(signed, both.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(hidden_attention(shared, plan), np.abs(both).mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("name", ["vim_micro", "plain_mamba_micro"])
def test_scan_arguments_are_what_the_block_scans(name, official_case):
    """Gated and projected, the scan of a real block's arguments gives the block's output."""
    case = official_case(name)

    def both_ways(model, images):
        tokens = model.embed(images)
        block, paths = model.blocks[1], model.paths(tokens)
        scan, plan = block.scan_arguments(tokens, paths)
        x = block.norm(tokens.x if tokens.residual is None else tokens.residual + tokens.x)
        z = jnp.split(block.mixer.in_proj(x), 2, axis=-1)[1]
        settings = dict(reverse=plan.reverse, order=scan.order, reorder_parameters=plan.reorder_parameters)
        y, _ = directional_scan(*scan[:6], z, scan.delta_bias, **settings)
        return block.mixer.out_proj(y if tokens.residual is None else y / 2), block.mixer(x, paths)[0]

    projected, expected = quick_jit(both_ways)(case.build(), jnp.asarray(case.image[:1]))
    np.testing.assert_allclose(projected, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def test_long_memory_keeps_its_digits():
    """A slowly decaying channel late in the sequence, which sums from the start would lose to rounding."""
    length = 400
    ones, zeros = np.ones((1, 1, length, 1), np.float32), np.zeros((1, 1), np.float32)
    delta = np.full_like(ones, 20.0)  # a long time, then three short steps
    delta[:, :, length - 3 :] = -8.0
    scan = ScanArguments(*map(jnp.asarray, (ones, delta, -ones[:, :, :1, 0], ones, ones, zeros, zeros)))
    step = np.log1p(np.exp(-8.0))
    found = np.asarray(channel_attention(scan, ScanPlan((False,))))[0, 0, -1, length - 3]
    np.testing.assert_allclose(found, np.exp(-2 * step) * step, rtol=2e-6)
