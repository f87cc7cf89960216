"""One result: a checkpoint under a setting, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from top_jax.pruning import Pruning

Row = dict[str, Any]
"""checkpoint, its weights (a fingerprint), seed (of its training, null for a file) and trained_pruned;
after_blocks, keep_ratio, alignment, order, score, random_seed (null where they mean nothing: the last five for the
dense model, random_seed but for the score random); finetuned (null, or steps, learning_rate, seed and run);
tokens_per_block, gmacs by convention; accuracy (share), correct and images (counts), loss (nats); left_out (indices of
unreadable images); correct_bits (base64: one bit per image that counted, in their order)."""

UNCHOSEN = {"keep_ratio": None, "alignment": None, "order": None, "score": None, "random_seed": None}


def describe(setting: Pruning) -> Row:
    """The part of a row that is the setting's."""
    if not setting.after_blocks:
        return {"after_blocks": [], **UNCHOSEN}
    return {
        "after_blocks": list(setting.after_blocks),
        "keep_ratio": list(setting.keep_ratio) if isinstance(setting.keep_ratio, tuple) else setting.keep_ratio,
        "alignment": setting.alignment,
        "order": setting.order,
        "score": setting.score,
        "random_seed": setting.seed if setting.score == "random" else None,
    }


def label(row: Row) -> str:
    """The setting in words."""
    if not row["after_blocks"]:
        return "dense"
    order = ", score order" if row["order"] == "score" else ""
    return f"{row['alignment']}{order}, {row['score']}, keep {ratio_text(row['keep_ratio'])}"


def ratio_of(setting: Row) -> Any:
    """keep_ratio as a `Pruning` has it: in JSON a tuple became a list."""
    ratio = setting["keep_ratio"]
    return tuple(ratio) if isinstance(ratio, list) else ratio


def ratio_text(keep_ratio: float | Sequence[float] | None) -> str:
    """0.8, or 0.8/0.7 where each prune has its own."""
    ratios = keep_ratio if isinstance(keep_ratio, Sequence) else [1.0 if keep_ratio is None else keep_ratio]
    return "/".join(f"{ratio:g}" for ratio in ratios)


def cell_of(row: Row) -> tuple[Any, ...]:
    """What rows have in common that are averaged: the setting but for the seed of `random`, and the training."""
    finetuned = row["finetuned"] and (row["finetuned"]["steps"], row["finetuned"]["learning_rate"])
    return tuple(row["after_blocks"]), ratio_of(row), row["alignment"], row["order"], row["score"], finetuned


def start_of(row: Row) -> tuple[Any, ...]:
    """What rows have in common that are compared: the weights they started from, and how these were trained on."""
    finetuned = row["finetuned"]
    return row["weights"], finetuned and (finetuned["steps"], finetuned["learning_rate"], finetuned["seed"])


def identity(row: Row) -> tuple[Any, ...]:
    """What makes a row another one."""
    return start_of(row), cell_of(row), row["random_seed"]


def to_bits(correct: np.ndarray) -> str:
    """bool [images] as text."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def from_bits(row: Row) -> np.ndarray:
    """bool [images] that a row counted: which of them it got right."""
    packed = np.frombuffer(base64.b64decode(row["correct_bits"]), np.uint8)
    return np.unpackbits(packed, count=row["images"]).astype(bool)
