"""Hidden-state alignment: what the state of a scan does at the positions of pruned tokens (ToP, arXiv 2409.18962).

Tokens survive at positions p_1 < ... < p_K of the scan's own order; gap_i = p_i - p_{i-1} - 1 for i >= 2, gap_1 = 0.
The alignment decides what happens to the state h at a pruned position q, and therefore what kept token i computes:

    none    q does not exist: tokens are re-indexed as in a smaller image, and the class token moves back to the middle
            (how a ViT is pruned; the paper's failing baseline)
            h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i
    hold    h_q = h_{q-1}: q takes the state of the previous remaining token (the paper's)
            h_i as above, in the original order of the tokens
    decay   h_q = exp(delta_prev A) h_{q-1}: the state also decays at q, by the time step delta_prev of the nearest kept
            token before q (ours)
            h_i = exp((delta_i + gap_i delta_{i-1}) A) h_{i-1} + delta_i B_i u_i

`none` and `hold` run the same recurrence; they differ in the order in which a model feeds its tokens. Each alignment
takes time proportional to the kept tokens, because a gap only multiplies a decay.
"""

from __future__ import annotations

from typing import Final

import jax.numpy as jnp

from top_jax.typing import Array, Float, Int
from top_jax.values import one_of

ALIGNMENTS: Final = ("none", "hold", "decay")


def check_alignment(alignment: str) -> None:
    """Raises InputError unless `alignment` is one of `ALIGNMENTS`."""
    one_of("alignment", alignment, ALIGNMENTS)


def gaps(positions: Int[Array, "_ B L"], reverse: tuple[bool, ...]) -> Float[Array, "G B L"]:
    """Counts the pruned positions between each token and the one scanned before it; 0 for the first scanned.

    Args:
        positions: int32 `[G?, B, L]`, increasing along L; G? is 1 where all directions share them.
        reverse: for each of the G directions, whether it scans its steps from the last to the first.

    Returns:
        float32 `[G, B, L]`.
    """
    places = jnp.broadcast_to(positions, (len(reverse), *positions.shape[1:])).astype(jnp.uint32)
    between = jnp.diff(places, axis=-1) - 1  # exact modulo 2**32, where an int32 difference may overflow
    sides = [(0, 1) if backwards else (1, 0) for backwards in reverse]
    padded = [jnp.pad(row, ((0, 0), side)) for row, side in zip(between, sides, strict=True)]
    return jnp.stack(padded).astype(jnp.float32)
