"""The public selective scan: validates its input, finds the gaps, chooses an implementation."""

from __future__ import annotations

import functools
from typing import Final

from top_jax.errors import InputError
from top_jax.ops.checks import (
    check_alignment,
    check_arrays,
    check_increasing,
    check_positions,
    check_reverse,
    check_shapes,
)
from top_jax.ops.fused import selective_scan_fused
from top_jax.ops.gaps import gaps
from top_jax.ops.implementations import PLAIN, resolve
from top_jax.typing import Inner, PerChannel, Positions, Selective, StateMatrix

_AXES: Final = {
    "u": "B L E", "delta": "B L E", "A": "E N", "B": "B L N", "C": "B L N", "D": "E", "z": "B L E", "delta_bias": "E",
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
    """Selective scan over the tokens that survive pruning (Mamba's S6, with ToP's hidden-state alignment).

    Per image and channel, with a float32 state h of size N::

        delta_t = softplus(delta_t + delta_bias)
        h_t = exp(tau_t A) h_{t-1} + delta_t B_t u_t
        out_t = (C_t . h_t + D u_t) * silu(z_t)

    where tau_t = delta_t for the alignments `none` and `hold` (they differ in the order in which a model feeds its
    tokens, not here), and tau_t = delta_t + gap_t delta_{t-1} for `decay`, gap_t being the number of pruned
    positions between token t and the one scanned before it. Cost and memory follow the tokens that are left.

    Args:
        u: `[B, L, E]` input, float32, bfloat16 or float16.
        delta: `[B, L, E]` time step before bias and softplus.
        A: `[E, N]` decay rates, negative for a stable scan.
        B: `[B, L, N]` input projection.
        C: `[B, L, N]` output projection.
        D: `[E]` skip weight.
        z: `[B, L, E]` gate, before SiLU.
        delta_bias: `[E]` added to delta before softplus.
        positions: int32 `[B, L]` place of each token in the unpruned sequence, strictly increasing along L. Needed
            by `decay`; checked wherever given.
        alignment: `none`, `hold` or `decay` (module docstring of `top_jax.pruning`).
        reverse: scan from the last token to the first, without copying; positions stay in forward coordinates.
        implementation: `auto` chooses by device and logs its choice once; a named one runs or raises: `reference`
            (to read), `xla` (any device), `triton` and `pallas` (NVIDIA GPUs), `pallas_interpret` (to test the latter
            anywhere, slowly).
        check_order: False leaves out the check that positions increase, for callers who know that they do: in a
            jitted program it costs every call several milliseconds (`top_jax.ops.checks.check_increasing`).

    Returns:
        `[B, L, E]`, dtype of u. Reverse-mode differentiable in every floating-point argument; forward mode (`jvp`)
        and derivatives of derivatives are for `reference`.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown name or one that cannot run here, `decay` without
            positions, or positions that do not increase (seen where they are concrete; under `checkify` when traced;
            never under plain jit).

    Source: Mamba, arXiv 2312.00752, section 3; mamba_ssm/ops/selective_scan_interface.py, `selective_scan_ref`;
    alignment: ToP, arXiv 2409.18962, section 4.2.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_arrays(("D", "z", "delta_bias"), given)
    if u.ndim != 3 or A.ndim != 2:
        raise InputError(f"u has shape {u.shape} and A {A.shape}; selective_scan needs u [B, L, E] and A [E, N].")
    sizes = dict(zip("BLE", u.shape, strict=True), N=A.shape[1])
    check_shapes(sizes, {name: (array, _AXES[name]) for name, array in given.items()})
    reverse = check_reverse(reverse)
    check_alignment(alignment)
    check_positions(positions, u.shape[:2], alignment)
    if check_order and positions is not None:
        check_increasing(positions)
    gap = gaps(positions, reverse) if alignment == "decay" and positions is not None else None
    name = resolve(implementation)
    route = PLAIN.get(name) or functools.partial(selective_scan_fused, name)
    return route(u, delta, A, B, C, D, z, delta_bias, gap, reverse)
