"""Arguments and results of a scan in several directions, as every implementation and kernel launcher takes them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

import jax.numpy as jnp

from top_jax.typing import Array, Float, Int

LOG2_E: Final = 1.4426950408889634


class ScanArguments(NamedTuple):
    """Arrays of a selective scan in G directions, directions first.

    `G?` is G, or 1 where all directions share the array; `direction` gives the same record without that axis. The
    kernels need A, B, C, D, delta_bias, gap and order for every direction, in float32 or int32, and D and delta_bias
    present (`top_jax.ops.fused.kernel_arguments`).

    Attributes:
        u: `[G?, B, L, E]` input.
        delta: `[G?, B, L, E]` time step before bias and softplus.
        A: `[G?, E, N]` decay rates, negative for a stable scan.
        B: `[G?, B, L, N]` input projection.
        C: `[G?, B, L, N]` output projection.
        D: `[G?, E]` skip weight, or None.
        delta_bias: `[G?, E]` added to delta before softplus, or None.
        gap: float32 `[G?, B, L]` pruned positions between each step's token and the one scanned before it, through
            which the state decays; None if there are no gaps.
        order: int32 `[G?, B, L]` token that each step visits, or None for 0..L-1.
    """

    u: Float[Array, "*G B L E"]
    delta: Float[Array, "*G B L E"]
    A: Float[Array, "*G E N"]
    B: Float[Array, "*G B L N"]
    C: Float[Array, "*G B L N"]
    D: Float[Array, "*G E"] | None = None
    delta_bias: Float[Array, "*G E"] | None = None
    gap: Float[Array, "*G B L"] | None = None
    order: Int[Array, "*G B L"] | None = None

    @property
    def sizes(self) -> tuple[Any, int, int, int]:
        """(B, L, E, N); B is an int, or a symbolic dimension while `jax.export` lowers for any batch size."""
        return (*self.u.shape[-3:], self.A.shape[-1])

    def direction(self, g: Any) -> ScanArguments:
        """The arrays of direction g, an int or traced, without their first axis."""
        return ScanArguments(*(a if a is None else jnp.squeeze(a, 0) if len(a) == 1 else a[g] for a in self))

    def for_kernels(self) -> ScanArguments:
        """The arguments with A times log2(e), because GPUs compute exp2."""
        return self._replace(A=self.A * LOG2_E)


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """Settings of a scan that are fixed when it is compiled.

    Attributes:
        reverse: for each direction, whether it scans its steps from the last to the first.
        reorder_parameters: with an order, read delta, B and C at the visited token; otherwise at the step itself.
        score: None, or the token score to compute: `clip`, `noclip`, `l1` or `l2`.
    """

    reverse: tuple[bool, ...]
    reorder_parameters: bool = True
    score: str | None = None


class ScanOutputs(NamedTuple):
    """Results of a forward kernel.

    Attributes:
        y: `[G, B, L, E]` in u's dtype.
        starts: `[G, B, ..]` float32 states at the start of each segment, in the layout that the implementation's
            backward reads; None if not saved.
    """

    y: Any
    starts: Any | None


class ScanGradients(NamedTuple):
    """Results of a backward kernel: gradients, some of them still to be summed over images or blocks of channels.

    Attributes:
        u: `[G, B, L, E]` in u's dtype.
        delta: `[G, B, L, E]` in delta's dtype.
        A: `[G, B, E, N]` float32.
        B: `[blocks, G, B, L, N]` float32.
        C: `[blocks, G, B, L, N]` float32.
        D: `[G, B, E]` float32.
        delta_bias: `[G, B, E]` float32.
    """

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    delta_bias: Any
