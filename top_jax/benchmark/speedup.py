"""Speed-up over the dense model from times measured in pairs, and what to say of it.

A round measures every contestant once. The speed-up is the median over the rounds of dense time / own time in the same
round, with the quartiles of those ratios: a slow spell of the machine slows both and leaves their ratio.

Of a pruned model the verdict is, in this order,

    SLOWER   the upper quartile of the speed-up is below 1
    NO GAIN  1 lies between the quartiles: no difference from the dense model can be told
    LITTLE   even the upper quartile saves less than half of the time that the multiply-accumulates promise:
             (1 - 1 / speed-up) is less than half of (1 - 1 / ratio), ratio being dense / own multiply-accumulates
    PAYS     anything else

and the first three are where pruning does not pay. The ratio is that of the `executed` convention where it is counted,
else of `published`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from top_jax.benchmark.timing import Spread, spread

SLOWER: Final = "slower than dense"
NO_GAIN: Final = "no faster than dense"
LITTLE: Final = "pays little"
PAYS: Final = "pays"
LEAST_SHARE: Final = 0.5  # of the time that the multiply-accumulates promise


def paired_speedup(dense: Sequence[float], own: Sequence[float]) -> Spread:
    """Dense time / own time, round by round.

    Args:
        dense: seconds of the dense model in each round.
        own: of the other in the same rounds.
    """
    return spread([d / o for d, o in zip(dense, own, strict=True)])


def macs_ratios(dense: Mapping[str, int], own: Mapping[str, int]) -> dict[str, float]:
    """Dense / own multiply-accumulates by convention."""
    return {convention: dense[convention] / own[convention] for convention in own}


def judged_by(conventions: Mapping[str, Any]) -> str:
    """The convention that a verdict goes by."""
    return "executed" if "executed" in conventions else "published"


def verdict(speedup: Spread, macs_ratio: float) -> str:
    """One of the four, for a pruned model; `macs_ratio` is dense / own."""
    if speedup.high < 1:
        return SLOWER
    if speedup.low <= 1:
        return NO_GAIN
    saved, promised = 1 - 1 / speedup.high, 1 - 1 / macs_ratio
    return LITTLE if saved < LEAST_SHARE * promised else PAYS


def conclusions(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences that say where pruning does not pay, from the rows of a report; none where no row was judged."""
    judged = [row for row in rows if "verdict" in row]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in judged:
        if row["verdict"] != PAYS:
            groups.setdefault((row["pass"], row["batch"], row["verdict"]), []).append(_told(row))
    lines = [
        f"{which}, batch {batch}: {_PHRASES[found]}: {'; '.join(told)}."
        for (which, batch, found), told in groups.items()
    ]
    return lines if lines or not judged else ["Nowhere: it pays in all that was measured here."]


_PHRASES: Final = {
    SLOWER: SLOWER,
    NO_GAIN: f"{NO_GAIN}, as far as can be told",
    LITTLE: "faster, but by less than half of the time that the multiply-accumulates promise",
}


def _told(row: dict[str, Any]) -> str:
    convention = judged_by(row["macs_ratio"])
    low, high = row["speedup_quartiles"]
    return (
        f"{row['contestant']} at {row['speedup']:.2f} times the dense speed ({low:.2f} .. {high:.2f}; "
        f"{convention} {row['macs_ratio'][convention]:.2f})"
    )
