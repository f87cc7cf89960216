"""Means of rows with their errors, and paired comparisons of two settings.

There are two errors, which answer two questions and are never mixed:

    spread          standard deviation over runs (checkpoints, seeds of `random`, seeds of fine-tuning) with n - 1 in
                    the denominator: would another training give the same?
    sampling error  standard error over images: would other images of the same kind give the same? For one run it is the
                    binomial sqrt(p (1 - p) / images). Several runs see the same images, so it is the standard error of
                    the per-image mean over runs. mIoU is not a mean over images; `evaluate.miou_of_images` makes it
                    one, to first order.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from top_jax.ablation.results import Row, cell_key, result_of_images, start_key
from top_jax.optional import needs_extras

with needs_extras("ablate"):
    from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its two errors, as fractions (0.01 is one point of accuracy or of mIoU).

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
        runs, checkpoints, images: the number of each.
        accuracy: fraction of the images that are classified correctly; None for a segmenter.
        drop: accuracy or mIoU of the dense model minus this one's. Each run is compared with the dense model of its own
            checkpoint (after the same fine-tuning) on the same images. None for the dense model, and where there is no
            dense model to compare with.
        lost, gained: number of images that only the dense model, or only this one, classifies correctly, over all runs.
            0 for a segmenter, which does not classify images.
        miou, pixel_accuracy: of a segmenter: mean IoU of the classes, and the mean over runs of the share of the
            labelled pixels that are classified correctly.
        fill: how a segmenter's maps are filled where tokens were dropped; None for the dense model.
        backbone_gmacs: as gmacs, without the neck and the heads, which are not pruned; None for a classifier.
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
    accuracy: Estimate | None
    drop: Estimate | None
    lost: int
    gained: int
    miou: Estimate | None = None
    pixel_accuracy: float | None = None
    fill: str | None = None
    backbone_gmacs: dict[str, float] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """`cell_key` of each of its rows."""
        return self.after_blocks, self.keep_ratio, self.alignment, self.order, self.score, self.fill, self.finetuned

    @property
    def result(self) -> Estimate:
        """The accuracy, or a segmenter's mIoU."""
        result = self.accuracy if self.miou is None else self.miou
        assert result is not None
        return result

    @property
    def pruned_gmacs(self) -> dict[str, float]:
        """The multiply-accumulates of the part that is pruned: a segmenter's backbone, else the whole model."""
        return self.gmacs if self.backbone_gmacs is None else self.backbone_gmacs

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
            dense[start_key(row)] = result_of_images(row)
    return [_cell(key, group, dense) for key, group in groups.items()]


def estimate(per_image: Sequence[np.ndarray]) -> Estimate:
    """Returns the mean of per-image scores over runs, with its errors.

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
    after_blocks, keep_ratio, alignment, order, score, fill, finetuned = key
    first, results = group[0], [result_of_images(row) for row in group]
    pairs = [(dense[start_key(row)], own) for row, own in zip(group, results, strict=True) if start_key(row) in dense]
    drops = [_difference(reference, own) for reference, own in pairs] if after_blocks else []
    segments = "miou" in first
    lost, gained = _one_sided([] if segments else drops)
    return Cell(
        after_blocks=after_blocks,
        keep_ratio=keep_ratio,
        alignment=alignment,
        order=order,
        score=score,
        finetuned=finetuned,
        tokens_per_block=tuple(first["tokens_per_block"]),
        gmacs=first["gmacs"],
        runs=len(group),
        checkpoints=len({row["weights"] for row in group}),
        images=first["images"],
        accuracy=None if segments else estimate(results),
        drop=estimate(drops) if drops else None,
        lost=lost,
        gained=gained,
        miou=estimate(results) if segments else None,
        pixel_accuracy=statistics.fmean(row["pixel_accuracy"] for row in group) if segments else None,
        fill=fill,
        backbone_gmacs=first.get("backbone_gmacs"),
    )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) - b


def _one_sided(differences: Iterable[np.ndarray]) -> tuple[int, int]:
    """Counts the images that only the first of two models classifies correctly, and those that only the second does."""
    signs = np.concatenate([np.sign(one) for one in differences] or [np.zeros(0)])
    return int(np.sum(signs > 0)), int(np.sum(signs < 0))


class Comparison(NamedTuple):
    """One setting compared with a reference, image by image.

    Attributes:
        cell: the setting.
        reference: the setting that it is compared with.
        difference: accuracy or mIoU minus the reference's, over pairs of runs that start from the same weights.
        only_this: number of images that only `cell` classifies correctly, over all pairs of runs; 0 for a segmenter.
        only_reference: number of images that only the reference classifies correctly; 0 for a segmenter.
        pairs: number of pairs of runs.
        p_value: two-sided p-value of McNemar's exact test of a single pair of runs. None for several pairs: they share
            their images, so adding up their counts is not a test. Look at the spread of the difference instead. None
            for a segmenter too, which does not classify images.
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
    rows = list(rows)
    these, others = ([row for row in rows if cell_key(row) == of.key] for of in (cell, reference))
    same_start = [(a, b) for a in these for b in others if start_key(a) == start_key(b)]
    if not same_start:
        return None
    differences = [_difference(result_of_images(a), result_of_images(b)) for a, b in same_start]
    only_this, only_reference = _one_sided(differences if cell.miou is None else [])
    return Comparison(
        cell=cell,
        reference=reference,
        difference=estimate(differences),
        only_this=only_this,
        only_reference=only_reference,
        pairs=len(differences),
        p_value=mcnemar(only_this, only_reference) if cell.miou is None and len(differences) == 1 else None,
    )


def mcnemar(only_one: int, only_other: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test of two counts of images; 1.0 if both are 0.

    Source: McNemar, Psychometrika 12 (1947).
    """
    differing = only_one + only_other
    return float(stats.binomtest(only_one, differing).pvalue) if differing else 1.0
