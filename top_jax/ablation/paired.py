"""Two settings on the same images: the images on which they differ say more than two accuracies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from top_jax.ablation.rows import Row, cell_of, from_bits, start_of
from top_jax.ablation.statistics import Cell, Number, number


class Comparison(NamedTuple):
    """One setting against a reference.

    Attributes:
        cell: of the one.
        reference: of the other.
        difference: in accuracy, the one less the reference, in shares, of runs that start from the same weights.
        only_this: images that only the one got right, over all pairs of runs.
        only_reference: those that only the reference did.
        pairs: of runs.
        p_value: of McNemar's exact test, two-sided: how likely so uneven a pair of counts is where neither is better on
            images like these. Of one pair of runs; None of several, whose images are the same and so no new evidence:
            there the spread of the difference speaks.
    """

    cell: Cell
    reference: Cell
    difference: Number
    only_this: int
    only_reference: int
    pairs: int
    p_value: float | None


def compare(rows: Iterable[Row], cell: Cell, reference: Cell) -> Comparison | None:
    """Compares each run of one cell with each of the other that starts from the same weights.

    Args:
        rows: those that the cells were made of.
        cell: of `summarise`.
        reference: as well.

    Returns:
        None where no two runs can be compared.
    """
    these, others = [], []
    for row in rows:
        if cell_of(row) == cell.key:
            these.append(row)
        elif cell_of(row) == reference.key:
            others.append(row)
    pairs = [(from_bits(a), from_bits(b)) for a in these for b in others if start_of(a) == start_of(b)]
    if not pairs:
        return None
    only_this = sum(int((a & ~b).sum()) for a, b in pairs)
    only_reference = sum(int((b & ~a).sum()) for a, b in pairs)
    return Comparison(
        cell=cell,
        reference=reference,
        difference=number([a.astype(int) - b for a, b in pairs]),
        only_this=only_this,
        only_reference=only_reference,
        pairs=len(pairs),
        p_value=mcnemar(only_this, only_reference) if len(pairs) == 1 else None,
    )


def mcnemar(only_one: int, only_other: int) -> float:
    """The exact two-sided p-value: of that many coins, so uneven a split or a more uneven one.

    Source: McNemar, Psychometrika 12 (1947).
    """
    coins, fewer = only_one + only_other, min(only_one, only_other)
    ways = sum(math.comb(coins, heads) for heads in range(fewer + 1))
    return min(1.0, 2 * ways / 2**coins)
