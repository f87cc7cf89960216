"""The public selective scans, in one direction and in several: check the arguments, then run an implementation."""

from __future__ import annotations

from typing import Any, Final

import jax

from top_jax.errors import InputError
from top_jax.kernels.blocks import Blocks, choose_blocks
from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.ops.alignment import check_alignment, gaps
from top_jax.ops.checks import (
    check_arrays,
    check_increasing,
    check_permutations,
    check_places,
    check_positions,
    check_reverse,
    check_shapes,
)
from top_jax.ops.directions import TOKEN_SCORES, one_by_one, score_of_sums
from top_jax.ops.fused import fused_scan, kernel_arguments
from top_jax.ops.implementations import PLAIN, device_kind, resolve
from top_jax.typing import Array, Float, Inner, Int, PerChannel, PerToken, Positions, Selective, StateMatrix
from top_jax.values import flag, one_of, refused

# `G?` is G or 1; `selective_scan` takes the same arrays without that axis.
_AXES: Final = {
    "u": "G? B L E", "delta": "G? B L E", "A": "G? E N", "B": "G? B L N", "C": "G? B L N", "D": "G? E", "z": "B L E",
    "delta_bias": "G? E",
}  # fmt: skip


def selective_scan(
    u: Inner,
    delta: Inner,
    A: StateMatrix,
    B: Selective,
    C: Selective,
    D: PerChannel | None = None,
    z: Inner | None = None,
    delta_bias: PerChannel | None = None,
    *,
    positions: Positions | None = None,
    alignment: str = "none",
    reverse: bool = False,
    implementation: str = "auto",
    check_order: bool = True,
) -> Inner:
    """Runs the selective scan over the tokens that survive pruning (Mamba's S6, with ToP's hidden-state alignment).

    Per image and channel, with a float32 state h of size N:

        delta_t = softplus(delta_t + delta_bias)
        h_t = exp(tau_t A) h_{t-1} + delta_t B_t u_t
        out_t = (C_t . h_t + D u_t) * silu(z_t)

    where tau_t = delta_t for the alignments `none` and `hold`, which differ only in the order in which a model feeds
    its tokens. For `decay`, tau_t = delta_t + gap_t delta_{t-1}, where gap_t is the number of pruned positions between
    token t and the one scanned before it. Time and memory are proportional to the tokens that are left.

    Args:
        u: `[B, L, E]` input, float32, bfloat16 or float16.
        delta: `[B, L, E]` time step before bias and softplus.
        A: `[E, N]` decay rates, negative for a stable scan.
        B: `[B, L, N]` input projection.
        C: `[B, L, N]` output projection.
        D: `[E]` skip weight.
        z: `[B, L, E]` gate, before SiLU.
        delta_bias: `[E]` added to delta before softplus.
        positions: int32 `[B, L]` index of each token in the unpruned sequence, strictly increasing along L. `decay`
            needs them; they are checked with any alignment.
        alignment: `none`, `hold` or `decay` (`top_jax.ops.alignment`).
        reverse: scan from the last token to the first, without copying; positions stay in forward coordinates.
        implementation: `auto` chooses by device and logs its choice once; a named one runs or raises: `reference` (the
            readable specification), `xla` (any device), `triton` and `pallas` (NVIDIA GPUs), `pallas_interpret` (runs
            `pallas` on any device, slowly, for tests).
        check_order: False omits the check that positions increase, for callers that guarantee it. In a jitted program
            the check costs every call several milliseconds (`top_jax.ops.checks.check_increasing`).

    Returns:
        `[B, L, E]`, dtype of u; the GPU kernels round to it once more before the gate. Reverse-mode differentiable in
        every floating-point argument; only `reference` supports forward mode (`jvp`) and second derivatives.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown name or one that cannot run here, `decay` without
            positions, or positions that do not increase. Concrete positions are checked for this, and traced ones under
            `checkify`, but not under plain jit.

    Source: Mamba, arXiv 2312.00752, section 3; mamba_ssm/ops/selective_scan_interface.py, `selective_scan_ref`;
    alignment: ToP, arXiv 2409.18962, section 4.2.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_arrays(("D", "z", "delta_bias"), given)
    if u.ndim != 3 or A.ndim != 2:
        raise InputError(f"u has shape {u.shape} and A {A.shape}; selective_scan needs u [B, L, E] and A [E, N].")
    sizes = dict(zip("BLE", u.shape, strict=True), N=A.shape[1])
    check_shapes(sizes, {name: (array, _AXES[name].removeprefix("G? ")) for name, array in given.items()})
    plan = ScanPlan((check_reverse(reverse),))
    check_alignment(alignment)
    check_positions(positions, u.shape[:2], alignment)
    if flag("check_order", check_order) and positions is not None:
        check_increasing(positions)
    arguments = ScanArguments(
        u[None],
        delta[None],
        A[None],
        B[None],
        C[None],
        None if D is None else D[None],
        None if delta_bias is None else delta_bias[None],
        None if alignment != "decay" or positions is None else gaps(positions[None], plan.reverse),
    )
    return _scan(arguments, z, plan, implementation, None)[0]


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
    """Runs selective scans in G directions, restores the tokens' order, sums, gates and scores.

    With scan_g the `selective_scan` of direction g over its steps:

        y = silu(z) * sum_g scan_g        score = mean_e max(0, y_e)    (`clip`; float32, before y is rounded)

    The GPU kernels round each scan_g to u's dtype; sum, gate and score are float32.

    ViM's two directions are `reverse=(False, True)`. PlainMamba's four have an `order` each: step i of direction g
    visits token `order[g, b, i]`, which the kernels look up instead of gathering in memory. `G?` is G, or 1 where all
    directions share an array, whose gradient is then summed over them.

    Args:
        u: `[G?, B, L, E]` input, float32, bfloat16 or float16.
        delta: `[G?, B, L, E]` time step before bias and softplus.
        A: `[G?, E, N]` decay rates, negative for a stable scan.
        B: `[G?, B, L, N]` input projection.
        C: `[G?, B, L, N]` output projection.
        D: `[G?, E]` skip weight, added in every direction.
        z: `[B, L, E]` gate of the sum, before SiLU.
        delta_bias: `[G?, E]` added to delta before softplus.
        reverse: for each of the G directions, whether it scans its steps from the last to the first.
        order: int32 `[G?, B, L]` permutations of 0..L-1: the token that each step visits. None is 0..L-1.
            Checked in the same cases as positions.
        reorder_parameters: with an order, take delta, B and C at the visited token. False takes those of step i from
            row i, as the official PlainMamba does (docs/concepts/models.md).
        positions: int32 `[G?, B, L]` index of each *step* in the unpruned traversal, strictly increasing along L.
            `decay` needs them; checked as in `selective_scan`.
        alignment: `none`, `hold` or `decay` (`top_jax.ops.alignment`).
        score: None, or `clip`, `noclip`, `l1`, `l2`: mean over channels of max(0, y), y, |y|; root mean square of y.
        implementation: as in `selective_scan`.
        blocks: block sizes of a kernel implementation; None takes them from the device's tuning table, or by rule.
        check_order: False omits the checks that positions increase and orders are permutations (their cost:
            `selective_scan`). A kernel given a wrong order then writes outside its output.

    Returns:
        y `[B, L, E]` in the dtype of u, differentiable in every floating-point argument; score float32 `[B, L]`, or
        None. A score only selects tokens, so it carries no gradient.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown name or one that cannot run here, `decay` without
            positions, positions that do not increase, an order that is not a permutation, or blocks for an
            implementation that has none.

    Source: Vision Mamba, arXiv 2401.09417, section 3.3; PlainMamba, arXiv 2403.17695, section 3.2; score: ToP,
    arXiv 2409.18962, section 4.1.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check_directions(given, reverse, order, positions, alignment)
    if score is not None:
        one_of("score", score, TOKEN_SCORES)
    if blocks is not None and not isinstance(blocks, Blocks):
        raise refused("blocks", blocks, "top_jax.kernels.blocks.Blocks, or None")
    flag("reorder_parameters", reorder_parameters)
    if flag("check_order", check_order) and positions is not None:
        check_increasing(positions)
    if check_order and order is not None:
        check_permutations(order)
    plan = ScanPlan(tuple(bool(backwards) for backwards in reverse), reorder_parameters, score)
    gap = gaps(positions, plan.reverse) if alignment == "decay" and positions is not None else None
    return _scan(ScanArguments(u, delta, A, B, C, D, delta_bias, gap, order), z, plan, implementation, blocks)


def _scan(
    arguments: ScanArguments, z: Inner | None, plan: ScanPlan, implementation: str, blocks: Blocks | None
) -> tuple[Inner, PerToken | None]:
    """Runs checked arguments by the named implementation; returns y and the score as `directional_scan`."""
    name = resolve(implementation)
    _, _, width, states = arguments.sizes
    if name in PLAIN:
        if blocks is not None:
            raise InputError(f"blocks came with implementation {name!r}, which has none; leave them out.")
        y, sums = one_by_one(PLAIN[name], plan, arguments, z)
    else:
        blocks = blocks or choose_blocks(name.removesuffix("_interpret"), device_kind(), width, states)[0]
        result: Any = fused_scan(name, plan, blocks, kernel_arguments(arguments, len(plan.reverse)), z)
        y, sums = result
    if sums is None or plan.score is None:
        return y, None
    return y, score_of_sums(jax.lax.stop_gradient(sums), plan.score, width)


def _check_directions(given: dict[str, Any], reverse: Any, order: Any, positions: Any, alignment: str) -> None:
    """Raises InputError unless arrays, directions and positions fit together, as `directional_scan` needs them."""
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
    if order is not None:
        check_places("order", order, _shape_of_steps(order, len(reverse), u.shape))
    check_positions(positions, _shape_of_steps(positions, len(reverse), u.shape), alignment)


def _shape_of_steps(places: Any, directions: int, shape_of_u: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the shape that an order or positions must have: a row per direction, or one that all share."""
    return (1 if getattr(places, "shape", ())[:1] == (1,) else directions, *shape_of_u[1:3])
