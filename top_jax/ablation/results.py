"""The directory of an ablation, by which the same command goes on where it stopped.

settings.json      what all results have in common
results.jsonl      one line per result, appended as they come
runs/              of the fine-tuning
results.json, correctness.npz, tables.md, tables.csv, accuracy_vs_gflops.png    made of these (`report.py`)
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.files import write_json, write_text
from top_jax.pruning import Pruning
from top_jax.training.run_directory import FREE_TO_CHANGE, flatten, told_differences


class Results:
    """Rows that are there, and where the next go.

    Args:
        path: the directory, made if need be.
        settings: as of `common_settings`.

    Raises:
        InputError: it cannot be written, or holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self._file = path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._check_same()
            rows = _whole_lines(self._file)
            # Written anew, because a kill may have cut the last line short.
            write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
            write_json(path / "settings.json", settings)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
        self._rows = {identity(row): row for row in rows}

    @property
    def rows(self) -> list[Row]:
        """In the order in which they came."""
        return list(self._rows.values())

    def __contains__(self, row: Row) -> bool:
        return identity(row) in self._rows

    def add(self, row: Row) -> None:
        """Keeps a row; it is on the disk when this returns."""
        with self._file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self._rows[identity(row)] = row

    def check_weights(self, checkpoint: str, fingerprint: int) -> None:
        """Raises InputError where there are results of other weights of the same checkpoint."""
        for row in self.rows:
            if row["checkpoint"] == checkpoint and row["weights"] != fingerprint:
                raise InputError(
                    f"{self.path} holds results of other weights of {checkpoint} (it was trained on, or --which or "
                    "--ema were others); choose another --out."
                )

    def _check_same(self) -> None:
        file = self.path / "settings.json"
        if not file.is_file():
            if self._file.is_file():
                raise InputError(f"{self._file} has no settings.json beside it to say of what; choose another --out.")
            return
        stored = json.loads(file.read_text())
        if stored["training"] is None or self.settings["training"] is None:  # of one command of two that trained
            stored["training"] = self.settings["training"] = stored["training"] or self.settings["training"]
        there, here = flatten(stored), flatten(json.loads(json.dumps(self.settings)))
        changed = [key for key in dict.fromkeys((*here, *there)) if there.get(key) != here.get(key)]
        if changed:
            raise InputError(
                f"{self.path} holds results of other settings ({told_differences(changed, there, here)}); go on with "
                "those, or choose another --out."
            )


def common_settings(config: RunConfig, base: Pruning, limit_images: int | None, trains: bool) -> dict[str, Any]:
    """What all results of a directory have in common: what may change a number, and what rows do not say themselves.

    Args:
        config: of the models and the data.
        base: the point at which the tables cross.
        limit_images: None is all of them.
        trains: whether the settings of training count too.
    """
    content = {key: value for key, value in flatten(config.to_dict()).items() if key not in FREE_TO_CHANGE}
    of_training = ("batch_size", "augment.", "distillation.", "optimizer.")
    return {
        **{key: value for key, value in content.items() if key.startswith(("model.", "data."))},
        "limit_images": limit_images,
        "base": {name: value for name, value in describe(base).items() if name != "random_seed"},
        "training": {key: content[key] for key in content if key.startswith(of_training)} if trains else None,
    }


def _whole_lines(file: Path) -> list[Row]:
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


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
