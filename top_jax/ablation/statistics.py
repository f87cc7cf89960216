"""Means of rows, and how far they can be trusted.

Two errors, which answer two questions and are never mixed:

    spread          standard deviation over runs (checkpoints, seeds of `random`, seeds of fine-tuning), n - 1 in its
                    denominator: would another training give the same?
    sampling error  standard error over images: would other images of the same kind give the same? Of one run it is the
                    binomial sqrt(p (1 - p) / images); of several, whose images are the same, it is that of the
                    per-image mean over runs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from top_jax.ablation.results import Row, cell_of, from_bits, start_of


@dataclasses.dataclass(frozen=True)
class Number:
    """A mean with its two errors, all in shares (0.01 is one point of accuracy).

    Attributes:
        mean: over runs.
        spread: over runs; None of a single one.
        sampling_error: over images.
    """

    mean: float
    spread: float | None
    sampling_error: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """All runs of a setting: one line of a table.

    Attributes:
        after_blocks, keep_ratio, alignment, order, score: the setting; the last four None for the dense model.
        finetuned: (steps, learning_rate), or None.
        tokens_per_block: class token included.
        gmacs: by convention.
        runs, checkpoints, images: how many of each.
        accuracy: share of the images.
        drop: accuracy of the dense model less this one's, each run against the dense model of its own checkpoint
            (after the same fine-tuning), on the same images; None for the dense model, or where that is not there.
        lost, gained: images that only the dense model got right, and only this one, over all runs.
    """

    after_blocks: tuple[int, ...]
    keep_ratio: float | tuple[float, ...] | None
    alignment: str | None
    order: str | None
    score: str | None
    finetuned: tuple[int, float] | None
    tokens_per_block: tuple[int, ...]
    gmacs: dict[str, float]
    runs: int
    checkpoints: int
    images: int
    accuracy: Number
    drop: Number | None
    lost: int
    gained: int

    @property
    def key(self) -> tuple[Any, ...]:
        """As `cell_of` gives it for each of its rows."""
        return self.after_blocks, self.keep_ratio, self.alignment, self.order, self.score, self.finetuned

    @property
    def is_dense(self) -> bool:
        """Whether it is the model that prunes nothing."""
        return not self.after_blocks


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """One cell for each setting, in the order in which they first come.

    Args:
        rows: as of `run_ablation`, all of the same images.
    """
    groups: dict[Any, list[Row]] = {}
    dense = {}
    for row in rows:
        groups.setdefault(cell_of(row), []).append(row)
        if not row["after_blocks"]:
            dense[start_of(row)] = from_bits(row)
    return [_cell(key, group, dense) for key, group in groups.items()]


def number(per_image: Sequence[np.ndarray]) -> Number:
    """Of what each run scored on each image: a list of arrays of shape [images]."""
    stacked = np.stack(per_image).astype(np.float64)
    means = stacked.mean(axis=1).tolist()
    over_runs = stacked.mean(axis=0)
    return Number(
        mean=statistics.fmean(means),
        spread=statistics.stdev(means) if len(means) > 1 else None,
        sampling_error=float(np.std(over_runs) / np.sqrt(over_runs.size)),
    )


def _cell(key: tuple[Any, ...], group: list[Row], dense: dict[Any, np.ndarray]) -> Cell:
    after_blocks, keep_ratio, alignment, order, score, finetuned = key
    right = [from_bits(row) for row in group]
    pairs = [(dense[start_of(row)], bits) for row, bits in zip(group, right, strict=True) if start_of(row) in dense]
    drops = [reference.astype(np.int64) - bits for reference, bits in pairs] if after_blocks else []
    return Cell(
        after_blocks=after_blocks,
        keep_ratio=keep_ratio,
        alignment=alignment,
        order=order,
        score=score,
        finetuned=finetuned,
        tokens_per_block=tuple(group[0]["tokens_per_block"]),
        gmacs=group[0]["gmacs"],
        runs=len(group),
        checkpoints=len({row["weights"] for row in group}),
        images=group[0]["images"],
        accuracy=number(right),
        drop=number(drops) if drops else None,
        lost=sum(int(np.sum(drop > 0)) for drop in drops),
        gained=sum(int(np.sum(drop < 0)) for drop in drops),
    )


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
