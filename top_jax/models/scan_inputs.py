"""What the scans of one block read, before the gate: for those who look inside a model."""

from __future__ import annotations

from typing import NamedTuple

from top_jax.typing import Array, Float, Int


class ScanInputs(NamedTuple):
    """Arguments of `top_jax.ops.directional_scan`, whose axes they have; `G?` is G, or 1 for what directions share.

    Attributes:
        u: `[G?, B, L, E]`.
        delta: `[G?, B, L, E]`, before bias and softplus.
        A: float32 `[G?, E, N]`.
        B: `[G?, B, L, N]`.
        C: `[G?, B, L, N]`.
        D: float32 `[G?, E]`.
        delta_bias: float32 `[G?, E]`.
        reverse: for each direction, whether it scans its steps from the last to the first.
        order: int32 `[G?, B, L]` the token that each step visits, or None for 0..L-1.
        reorder_parameters: with an order, delta, B and C are those of the visited token, not of row i.
        positions: int32 `[G?, B, L]` place of each step in the unpruned traversal, where gaps are felt (`decay`).
    """

    u: Float[Array, "_ B L E"]
    delta: Float[Array, "_ B L E"]
    A: Float[Array, "_ E N"]
    B: Float[Array, "_ B L N"]
    C: Float[Array, "_ B L N"]
    D: Float[Array, "_ E"]
    delta_bias: Float[Array, "_ E"]
    reverse: tuple[bool, ...]
    order: Int[Array, "_ B L"] | None = None
    reorder_parameters: bool = True
    positions: Int[Array, "_ B L"] | None = None

    @property
    def alignment(self) -> str:
        """Of the scan: `hold` and `none` are one recurrence, in different orders."""
        return "none" if self.positions is None else "decay"
