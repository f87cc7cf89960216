"""Means of rows with their errors, and paired comparisons of two settings.

There are two errors, which answer two questions and are never mixed:

    spread          standard deviation over runs (checkpoints, seeds of `random`, seeds of fine-tuning) with n - 1 in
                    the denominator: would another training give the same?
    sampling error  standard error over images: would other images of the same kind give the same? For one run it is the
                    binomial sqrt(p (1 - p) / images). Several runs see the same images, so it is the standard error of
                    the per-image mean over runs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from top_jax.ablation.results import Row, cell_key, from_bits, start_key
from top_jax.optional import needs_extras

with needs_extras("ablate"):
    from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its two errors, as fractions (0.01 is one point of accuracy).

    Attributes:
        mean: mean over runs.
        spread: standard deviation over runs; None for a single run.
        sampling_error: standard error over images.
    """

    mean: float
    spread: float | None
    sampling_error: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """All runs of one setting: one line of a table.

    Attributes:
        after_blocks, keep_ratio, alignment, order, score: the setting; the last four are None for the dense model.
        finetuned: (steps, learning_rate), or None without fine-tuning.
        tokens_per_block: tokens that enter each block, class token included.
        gmacs: multiply-accumulates per image in units of 1e9, by convention.
        runs, checkpoints, images: how many of each.
        accuracy: fraction of the images that are classified correctly.
        drop: accuracy of the dense model minus this accuracy. Each run is compared with the dense model of its own
            checkpoint (after the same fine-tuning) on the same images. None for the dense model and without it.
        lost, gained: number of images that only the dense model, or only this one, classifies correctly, over all runs.
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
    accuracy: Estimate
    drop: Estimate | None
    lost: int
    gained: int

    @property
    def key(self) -> tuple[Any, ...]:
        """`cell_key` of each of its rows."""
        return self.after_blocks, self.keep_ratio, self.alignment, self.order, self.score, self.finetuned

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return not self.after_blocks


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """Returns one cell per setting, in the order of their first rows.

    Args:
        rows: from `run_ablation`, all evaluated on the same images.
    """
    groups: dict[Any, list[Row]] = {}
    dense = {}
    for row in rows:
        groups.setdefault(cell_key(row), []).append(row)
        if not row["after_blocks"]:
            dense[start_key(row)] = from_bits(row)
    return [_cell(key, group, dense) for key, group in groups.items()]


def estimate(per_image: Sequence[np.ndarray]) -> Estimate:
    """Returns mean and errors of what each run scored on each image.

    Args:
        per_image: one array per run, all of shape `[images]`.
    """
    stacked = np.stack(per_image).astype(np.float64)
    means = stacked.mean(axis=1).tolist()
    over_runs = stacked.mean(axis=0)
    return Estimate(
        mean=statistics.fmean(means),
        spread=statistics.stdev(means) if len(means) > 1 else None,
        sampling_error=float(np.std(over_runs) / np.sqrt(over_runs.size)),
    )


def _cell(key: tuple[Any, ...], group: list[Row], dense: dict[Any, np.ndarray]) -> Cell:
    after_blocks, keep_ratio, alignment, order, score, finetuned = key
    right = [from_bits(row) for row in group]
    pairs = [(dense[start_key(row)], bits) for row, bits in zip(group, right, strict=True) if start_key(row) in dense]
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
        accuracy=estimate(right),
        drop=estimate(drops) if drops else None,
        lost=sum(int(np.sum(drop > 0)) for drop in drops),
        gained=sum(int(np.sum(drop < 0)) for drop in drops),
    )


class Comparison(NamedTuple):
    """One setting compared with a reference, image by image.

    Attributes:
        cell: the setting.
        reference: the setting that it is compared with.
        difference: accuracy minus the reference's accuracy, over pairs of runs that start from the same weights.
        only_this: number of images that only `cell` classifies correctly, over all pairs of runs.
        only_reference: number of images that only the reference classifies correctly.
        pairs: number of pairs of runs.
        p_value: two-sided p-value of McNemar's exact test of a single pair of runs. None for several pairs: they share
            their images, so adding up their counts is no test. Look at the spread of the difference instead.
    """

    cell: Cell
    reference: Cell
    difference: Estimate
    only_this: int
    only_reference: int
    pairs: int
    p_value: float | None


def compare(rows: Iterable[Row], cell: Cell, reference: Cell) -> Comparison | None:
    """Compares each run of a cell with each run of a reference that starts from the same weights.

    Args:
        rows: the rows that the cells were made from.
        cell: from `summarise`.
        reference: from `summarise`.

    Returns:
        The comparison, or None if no two runs start from the same weights.
    """
    these, others = [], []
    for row in rows:
        if cell_key(row) == cell.key:
            these.append(row)
        elif cell_key(row) == reference.key:
            others.append(row)
    pairs = [(from_bits(a), from_bits(b)) for a in these for b in others if start_key(a) == start_key(b)]
    if not pairs:
        return None
    only_this = sum(int((a & ~b).sum()) for a, b in pairs)
    only_reference = sum(int((b & ~a).sum()) for a, b in pairs)
    return Comparison(
        cell=cell,
        reference=reference,
        difference=estimate([a.astype(int) - b for a, b in pairs]),
        only_this=only_this,
        only_reference=only_reference,
        pairs=len(pairs),
        p_value=mcnemar(only_this, only_reference) if len(pairs) == 1 else None,
    )


def mcnemar(only_one: int, only_other: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test of two counts of images; 1.0 if both are 0.

    Source: McNemar, Psychometrika 12 (1947).
    """
    differing = only_one + only_other
    return float(stats.binomtest(only_one, differing).pvalue) if differing else 1.0
