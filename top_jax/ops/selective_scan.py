"""The public selective scan: validates its input, finds the gaps, chooses an implementation."""

from __future__ import annotations

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.core import Tracer
from jax.experimental import checkify

from top_jax.errors import InputError
from top_jax.ops.reference import selective_scan_reference
from top_jax.ops.xla import selective_scan_xla
from top_jax.typing import Inner, PerChannel, PerToken, Positions, Selective, StateMatrix

ALIGNMENTS: Final = ("none", "hold", "decay")
_ROUTES: Final = {"reference": selective_scan_reference, "xla": selective_scan_xla}
IMPLEMENTATIONS: Final = ("auto", *_ROUTES)


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
        u: `[B, L, E]` input, float32 or bfloat16.
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
        implementation: `auto`, `reference` or `xla`. `auto` logs its choice once; a named one runs or raises.

    Returns:
        `[B, L, E]`, dtype of u. Differentiable in every floating-point argument.

    Raises:
        InputError: shapes that do not fit, an unknown name, `decay` without positions, or positions that do not
            increase (seen where they are concrete; under `checkify` when traced; never under plain jit).

    Source: Mamba, arXiv 2312.00752, section 3; mamba_ssm/ops/selective_scan_interface.py, `selective_scan_ref`;
    alignment: ToP, arXiv 2409.18962, section 4.2.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    check_alignment(alignment)
    if positions is not None:
        _check_positions(positions, u.shape[:2])
    elif alignment == "decay":
        raise InputError(
            "alignment='decay' came without positions; it needs the int32 [B, L] place of each token in the unpruned "
            "sequence: pass positions=..., or alignment='hold'."
        )
    gap = _gaps(positions, reverse) if alignment == "decay" and positions is not None else None
    route = _ROUTES[resolve(implementation)]
    return route(u, delta, A, B, C, D, z, delta_bias, gap, reverse)


def check_alignment(alignment: str) -> None:
    """Raises InputError unless `alignment` is one of `ALIGNMENTS`."""
    if alignment not in ALIGNMENTS:
        raise InputError(f"alignment={alignment!r} is unknown; choose one of {', '.join(ALIGNMENTS)}.")


def resolve(implementation: str) -> str:
    """The implementation that runs on this machine's default device; InputError for an unknown name."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={implementation!r} is unknown here; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    return _choose() if implementation == "auto" else implementation


@functools.cache  # so that the choice is logged once
def _choose() -> str:
    logging.info("selective_scan: implementation 'auto' runs 'xla' on %s.", jax.default_backend())
    return "xla"


def _gaps(positions: Positions, reverse: bool) -> PerToken:
    """Pruned positions between each token and the one scanned before it; 0 for the first."""
    between = jnp.diff(positions, axis=1) - 1
    return jnp.pad(between, ((0, 0), (0, 1) if reverse else (1, 0))).astype(jnp.float32)


def _check_shapes(
    u: Inner,
    delta: Inner,
    A: StateMatrix,
    B: Selective,
    C: Selective,
    D: PerChannel | None,
    z: Inner | None,
    delta_bias: PerChannel | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise InputError(f"u has shape {u.shape} and A {A.shape}; selective_scan needs u [B, L, E] and A [E, N].")
    (batch, length, width), states = u.shape, A.shape[1]
    needed = {
        "delta": (delta, (batch, length, width)),
        "A": (A, (width, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (width,)),
        "z": (z, (batch, length, width)),
        "delta_bias": (delta_bias, (width,)),
    }
    for name, (array, shape) in needed.items():
        if array is not None and array.shape != shape:
            raise InputError(
                f"{name} has shape {array.shape}; with u {u.shape} and A {A.shape} it must be {shape} "
                "(tokens before channels: transpose PyTorch's [B, E, L])."
            )
    if length == 0:
        raise InputError(f"u has shape {u.shape}: selective_scan needs at least one token.")


def _check_positions(positions: Positions, shape: tuple[int, ...]) -> None:
    if positions.shape != shape or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(
            f"positions are {positions.dtype}{list(positions.shape)}; needed: int32{list(shape)}, as u's [B, L]."
        )
    if isinstance(positions, Tracer):
        checkify.debug_check(
            jnp.all(jnp.diff(positions, axis=1) > 0), "positions must increase strictly along every image's tokens"
        )
        return
    steps = np.diff(np.asarray(positions), axis=1)
    if (steps <= 0).any():
        image, token = np.argwhere(steps <= 0)[0]
        raise InputError(
            f"positions of image {image} go from {positions[image, token]} to {positions[image, token + 1]} at token "
            f"{token + 1}; they must increase strictly: sort the kept tokens by position."
        )
