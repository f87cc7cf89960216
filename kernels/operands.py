"""What the GPU kernels read and write, whichever route launches them.

A call scans one sequence in `G` directions. What all directions share may be passed once, with a leading axis of 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

import jax.numpy as jnp

Array = Any  # a jax.Array, or a jax.ShapeDtypeStruct where only its shape is asked for

LOG2_E: Final = 1.4426950408889634

# What a channel's y adds to the score of its token; the score is their mean over channels (`l2`: its root).
TOKEN_WORTH: Final = {
    "clip": lambda y: jnp.maximum(y, 0.0),
    "noclip": lambda y: y,
    "l1": jnp.abs,
    "l2": jnp.square,
}


class ScanOperands(NamedTuple):
    """Arrays of one call, directions first. `G?` is G, or 1 where all directions share the array.

    Attributes:
        u: `[G?, B, L, E]` input.
        delta: `[G?, B, L, E]` time step before bias and softplus.
        A: `[G, E, N]` float32 decay rates.
        B: `[G, B, L, N]` float32 input projection.
        C: `[G, B, L, N]` float32 output projection.
        D: `[G, E]` float32 skip weight.
        delta_bias: `[G, E]` float32.
        z: `[B, L, E]` gate of the sum over directions, before SiLU, or None.
        gap: `[G, B, L]` float32 pruned positions before each step, or None.
        order: `[G, B, L]` int32 token that each step visits, or None for the tokens' own order.
    """

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array
    delta_bias: Array
    z: Array | None
    gap: Array | None
    order: Array | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(G, B, L, E, N)."""
        directions, batch, length, states = self.B.shape
        return directions, batch, length, self.u.shape[-1], states

    def for_kernels(self) -> ScanOperands:
        """With A times log2(e), because exp2 is what the hardware has."""
        return self._replace(A=self.A * LOG2_E)


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """What is fixed before the kernel is compiled.

    Attributes:
        reverse: for each direction, whether it scans its steps from the last to the first.
        reorder_parameters: with an order, read delta, B and C at the visited token; otherwise at the step itself.
        score: None, or the token score to compute: `clip`, `noclip`, `l1` or `l2`.
    """

    reverse: tuple[bool, ...]
    reorder_parameters: bool = True
    score: str | None = None


class ScanOutputs(NamedTuple):
    """What a forward returns.

    Attributes:
        out: `[B, L, E]` in u's dtype.
        score: `[blocks, B, L]` float32 sums over each block of channels, or None.
        starts: `[G, B, chunks, E, N]` float32 state with which each chunk is entered, or None if not saved.
    """

    out: Array
    score: Array | None
    starts: Array | None


class ScanGradients(NamedTuple):
    """What a backward returns: gradients, and sums that are still split over images or blocks of channels.

    Attributes:
        u: `[G, B, L, E]` in u's dtype.
        delta: `[G, B, L, E]` in delta's dtype.
        A: `[G, B, E, N]` float32.
        B: `[blocks, G, B, L, N]` float32.
        C: `[blocks, G, B, L, N]` float32.
        D: `[G, B, E]` float32.
        delta_bias: `[G, B, E]` float32.
        z: `[B, L, E]` in z's dtype, or None.
    """

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array
    delta_bias: Array
    z: Array | None
