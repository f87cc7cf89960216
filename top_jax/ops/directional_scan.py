"""Several directions of one sequence in one scan, with the token score of their gated sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.kernels.blocks import Blocks
from top_jax.kernels.operands import (
    TOKEN_WORTH,
    ScanOperands,
    ScanPlan,
)
from top_jax.ops.checks import (
    check_alignment,
    check_arrays,
    check_increasing,
    check_permutations,
    check_places,
    check_positions,
    check_reverse,
    check_shapes,
)
from top_jax.ops.fused import default_blocks, fused_scan, make_operands
from top_jax.ops.gaps import directional_gaps
from top_jax.ops.implementations import PLAIN, resolve
from top_jax.ops.token_score import score_of_sums
from top_jax.typing import Array, Float, Inner, Int, PerToken, Positions

_AXES: Final = {
    "u": "G? B L E", "delta": "G? B L E", "A": "G? E N", "B": "G? B L N", "C": "G? B L N", "D": "G? E", "z": "B L E",
    "delta_bias": "G? E",
}  # fmt: skip


_DIRECTED: Final = ("u", "delta", "A", "B", "C", "D", "delta_bias", "gap", "order")  # all but z


def directional_scan(
    u: Float[Array, "_ B L E"],
    delta: Float[Array, "_ B L E"],
    A: Float[Array, "_ E N"],
    B: Float[Array, "_ B L N"],
    C: Float[Array, "_ B L N"],
    D: Float[Array, "_ E"] | None = None,
    z: Inner | None = None,
    delta_bias: Float[Array, "_ E"] | None = None,
    *,
    reverse: tuple[bool, ...],
    order: Int[Array, "_ B L"] | None = None,
    reorder_parameters: bool = True,
    positions: Int[Array, "_ B L"] | None = None,
    alignment: str = "none",
    score: str | None = None,
    implementation: str = "auto",
    blocks: Blocks | None = None,
    check_order: bool = True,
) -> tuple[Inner, PerToken | None]:
    """Selective scans in G directions, each put back into the tokens' order, summed, gated and scored.

    With scan_g the `selective_scan` of direction g over its steps::

        y = silu(z) * sum_g scan_g        score = mean_e max(0, y_e)    (`clip`; float32, before y is rounded)

    ViM's two directions are `reverse=(False, True)`. PlainMamba's four are an `order` each: step i of direction g
    visits token `order[g, b, i]`; an index map inside the kernel, not a gather in memory. `G?` is G, or 1 for what
    all directions share (its gradient is summed over them).

    Args:
        u: `[G?, B, L, E]` input, float32, bfloat16 or float16.
        delta: `[G?, B, L, E]` time step before bias and softplus.
        A: `[G?, E, N]` decay rates, negative for a stable scan.
        B: `[G?, B, L, N]` input projection.
        C: `[G?, B, L, N]` output projection.
        D: `[G?, E]` skip weight, added in every direction.
        z: `[B, L, E]` gate of the sum, before SiLU.
        delta_bias: `[G?, E]` added to delta before softplus.
        reverse: for each direction, whether it scans its steps from the last to the first; as long as G.
        order: int32 `[G?, B, L]` permutations of 0..L-1: the token that each step visits. None is 0..L-1.
            Checked as positions are.
        reorder_parameters: with an order, take delta, B and C at the visited token. False takes step i's from row i,
            as the official PlainMamba does (DESIGN.md, section 3).
        positions: int32 `[G?, B, L]` place of each *step* in the unpruned traversal, strictly increasing along L.
            Needed by `decay`; checked as in `selective_scan`.
        alignment: `none`, `hold` or `decay` (module docstring of `top_jax.pruning`).
        score: None, or `clip`, `noclip`, `l1`, `l2`: mean over channels of max(0, y), y, |y|; root mean square of y.
        implementation: as in `selective_scan`.
        blocks: block sizes of a kernel implementation; None is the device's tuning table, else a rule.
        check_order: False leaves out the checks that positions increase and orders are permutations; what it saves is
            in `selective_scan`. With a wrong order the kernels then write where they should not.

    Returns:
        y `[B, L, E]` in the dtype of u, differentiable in every floating-point argument; score float32 `[B, L]`, or
        None. A score is for choosing tokens: it carries no gradient.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown name or one that cannot run here, `decay` without
            positions, positions that do not increase, an order that is no permutation, blocks for an implementation
            that has none.

    Source: Vision Mamba, arXiv 2401.09417, section 3.3; PlainMamba, arXiv 2403.17695, section 3.2; score: ToP,
    arXiv 2409.18962, section 4.1.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check(given, reverse, order, positions, alignment, score, blocks)
    if check_order and positions is not None:
        check_increasing(positions)
    if check_order and order is not None:
        check_permutations(order)
    gap = directional_gaps(positions, reverse) if alignment == "decay" and positions is not None else None
    operands = make_operands(u, delta, A, B, C, D, z, delta_bias, gap, order, len(reverse))
    plan = ScanPlan(tuple(bool(backwards) for backwards in reverse), reorder_parameters, score)
    name = resolve(implementation)
    if name in PLAIN:
        if blocks is not None:
            raise InputError(f"blocks came with implementation {name!r}, which has none; leave them out.")
        y, sums = one_by_one(PLAIN[name], plan, operands)
    else:
        y, sums = fused_scan(name, plan, default_blocks(name, *A.shape[1:]) if blocks is None else blocks, operands)
    if sums is None or score is None:
        return y, None
    return y, score_of_sums(jax.lax.stop_gradient(sums), score, u.shape[-1])


def one_by_one(scan: Callable[..., Inner], plan: ScanPlan, operands: ScanOperands) -> tuple[Inner, PerToken | None]:
    """What `fused_scan` does, by one `scan` per direction; XLA fuses what stands around it.

    Args:
        scan: takes and returns what `selective_scan_reference` does.
        plan: directions and score.
        operands: see `ScanOperands`.
    """
    inverse = None if operands.order is None else jnp.argsort(operands.order, axis=-1)
    of = lambda g: {name: _at(getattr(operands, name), g) for name in _DIRECTED}  # noqa: E731
    if len(set(plan.reverse)) > 1:
        totals = [
            _scanned(scan, plan, operands._replace(**of(g)), _at(inverse, g), back)
            for g, back in enumerate(plan.reverse)
        ]
        return _gated(functools.reduce(jnp.add, totals), plan, operands)

    # Directions that run the same way share one loop: one body to compile instead of G.
    def add(total: Inner, g: jax.Array) -> tuple[Inner, None]:
        return total + _scanned(scan, plan, operands._replace(**of(g)), _at(inverse, g), plan.reverse[0]), None

    nothing = jnp.zeros_like(operands.u[0], jnp.float32)
    total, _ = jax.lax.scan(add, nothing, jnp.arange(len(plan.reverse)))
    return _gated(total, plan, operands)


def _at(array: Any, g: Any) -> Any:
    """An array of direction g, without its first axis."""
    return array if array is None else array[0 if len(array) == 1 else g]


def _scanned(
    scan: Callable[..., Inner], plan: ScanPlan, one: ScanOperands, inverse: Positions | None, backwards: bool
) -> Inner:
    """float32 `[B, L, E]` scan of a single direction, whose operands have lost their first axis, in token order."""
    u, delta, B, C = one.u.astype(jnp.float32), one.delta.astype(jnp.float32), one.B, one.C
    if one.order is not None:
        visited = one.order[:, :, None]
        u = jnp.take_along_axis(u, visited, axis=1)
        if plan.reorder_parameters:
            delta, B, C = (jnp.take_along_axis(a, visited, axis=1) for a in (delta, B, C))
    y = scan(u, delta, one.A, B, C, one.D, None, one.delta_bias, one.gap, backwards)
    return y if inverse is None else jnp.take_along_axis(y, inverse[:, :, None], axis=1)


def _gated(total: Inner, plan: ScanPlan, operands: ScanOperands) -> tuple[Inner, PerToken | None]:
    if operands.z is not None:
        total = total * jax.nn.silu(operands.z.astype(jnp.float32))
    y = total.astype(operands.u.dtype)
    return y, None if plan.score is None else jnp.sum(TOKEN_WORTH[plan.score](total), axis=-1)


def _check(
    given: dict[str, Any], reverse: Any, order: Any, positions: Any, alignment: str, score: Any, blocks: Any
) -> None:
    check_arrays(("D", "z", "delta_bias"), given)
    u, A = given["u"], given["A"]
    if u.ndim != 4 or A.ndim != 3 or not isinstance(reverse, tuple | list) or not reverse:
        raise InputError(
            f"u has shape {u.shape}, A {A.shape} and reverse is {reverse}; directional_scan needs u [G or 1, B, L, E], "
            "A [G or 1, E, N] and in reverse a bool for each of its G directions."
        )
    for backwards in reverse:
        check_reverse(backwards)
    sizes = dict(zip("BLE", u.shape[1:], strict=True), G=len(reverse), N=A.shape[2])
    check_shapes(sizes, {name: (array, _AXES[name]) for name, array in given.items()})
    check_alignment(alignment)
    steps = (len(reverse), *u.shape[1:3])
    if order is not None:
        check_places("order", order, _as_given(order, steps))
    check_positions(positions, _as_given(positions, steps), alignment)
    if score is not None and (not isinstance(score, str) or score not in TOKEN_WORTH):
        raise InputError(f"score={score!r} is unknown here; choose None or one of {', '.join(TOKEN_WORTH)}.")
    if blocks is not None and not isinstance(blocks, Blocks):
        raise InputError(f"blocks is a {type(blocks).__name__}; needed: top_jax.kernels.blocks.Blocks, or None.")


def _as_given(places: Any, steps: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """The shape that places of steps must have: for each direction, or once for all."""
    return (1, *steps[1:]) if getattr(places, "shape", ())[:1] == (1,) else steps
