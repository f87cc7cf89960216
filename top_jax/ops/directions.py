"""Runs a scan in several directions, one at a time; computes the token scores of their gated sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.typing import Inner, PerToken

# What one channel's y adds to its token's score. The score is the mean over channels (`l2`: the root of that mean).
TOKEN_WORTH: Final = {
    "clip": lambda y: jnp.maximum(y, 0.0),
    "noclip": lambda y: y,
    "l1": jnp.abs,
    "l2": jnp.square,
}
TOKEN_SCORES: Final = tuple(TOKEN_WORTH)

KEPT_OF_A_SCAN: Final = "kept of a scan"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of the values that `jax.checkpoint` must store to rerun no scan."""
kept_of_a_scan = functools.partial(checkpoint_name, name=KEPT_OF_A_SCAN)


def token_score(y: Inner, score: str) -> PerToken:
    """Scores tokens by the scan's final output: the paper's score (`clip`) and its ablations.

    Args:
        y: float32 `[B, L, E]`.
        score: `clip`, `noclip`, `l1` or `l2`: mean over channels of max(0, y), y, |y|, or root mean square.

    Returns:
        `[B, L]`.

    Source: ToP, arXiv 2409.18962, section 4.1.
    """
    return score_of_sums(jnp.sum(TOKEN_WORTH[score](y), axis=-1), score, y.shape[-1])


def score_of_sums(sums: PerToken, score: str, width: int) -> PerToken:
    """Returns the score `[B, L]` from the sums of `TOKEN_WORTH` over `width` channels."""
    mean = sums / width
    return jnp.sqrt(mean) if score == "l2" else mean


def for_each_direction(arguments: ScanArguments, directions: int) -> ScanArguments:
    """Converts all arrays except u and delta to float32 (order to int32), and repeats shared ones for every direction.

    B and C are a small part of the bytes, but converting them inside a kernel would cost many instructions.
    """

    def convert(array: jax.Array | None, dtype: Any = jnp.float32) -> Any:
        return None if array is None else jnp.broadcast_to(array.astype(dtype), (directions, *array.shape[1:]))

    small = {name: convert(getattr(arguments, name)) for name in ("A", "B", "C", "D", "delta_bias", "gap")}
    return arguments._replace(**small, order=convert(arguments.order, jnp.int32))


def one_by_one(
    scan: Callable[[ScanArguments, bool], Inner], plan: ScanPlan, arguments: ScanArguments, z: Inner | None
) -> tuple[Inner, PerToken | None]:
    """Computes the result of `fused_scan` by one `scan` per direction; XLA fuses the operations around it.

    Args:
        scan: a function with the arguments and result of `selective_scan_reference`.
        plan: directions and score.
        arguments: see `ScanArguments`.
        z: `[B, L, E]` gate of the sum over directions, before SiLU.

    Returns:
        As `top_jax.ops.fused.fused_scan`.
    """
    arguments = for_each_direction(arguments, len(plan.reverse))
    inverse = None if arguments.order is None else jnp.argsort(arguments.order, axis=-1)

    def scanned(g: Any, reverse: bool) -> Inner:
        steps = _in_order_of_steps(arguments.direction(g), reorder_parameters=plan.reorder_parameters)
        y = scan(steps, reverse)
        return y if inverse is None else jnp.take_along_axis(y, inverse[g][:, :, None], axis=1)

    if len(plan.reverse) == 1 or len(set(plan.reverse)) > 1:
        total = functools.reduce(jnp.add, (scanned(g, reverse) for g, reverse in enumerate(plan.reverse)))
    else:  # directions that run the same way share one loop: one body to compile instead of G
        zero = jnp.zeros_like(arguments.u[0], jnp.float32)
        add = lambda total, g: (total + scanned(g, plan.reverse[0]), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zero, jnp.arange(len(plan.reverse)))
    return gated_and_scored(kept_of_a_scan(total), z, plan, arguments.u.dtype)


def gated_and_scored(total: Inner, z: Inner | None, plan: ScanPlan, dtype: Any) -> tuple[Inner, PerToken | None]:
    """Gates and scores the float32 sum over directions `[B, L, E]`; returns y in `dtype`, and the score or None."""
    if z is not None:
        total = total * jax.nn.silu(z.astype(jnp.float32))
    return total.astype(dtype), None if plan.score is None else jnp.sum(TOKEN_WORTH[plan.score](total), axis=-1)


def _in_order_of_steps(one: ScanArguments, *, reorder_parameters: bool) -> ScanArguments:
    """Returns the arrays of one direction in the order of its steps, u and delta in float32."""
    u, delta, B, C = one.u.astype(jnp.float32), one.delta.astype(jnp.float32), one.B, one.C
    if one.order is not None:
        visited = one.order[:, :, None]
        u = jnp.take_along_axis(u, visited, axis=1)
        if reorder_parameters:
            delta, B, C = (jnp.take_along_axis(a, visited, axis=1) for a in (delta, B, C))
    return one._replace(u=u, delta=delta, B=B, C=C)
