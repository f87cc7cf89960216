"""The results of an ablation: one row per checkpoint and setting, in a directory that a second command continues.

settings.json      what all results have in common
results.jsonl      one row per line, appended after each evaluation
runs/              run directories of the fine-tuning
results.json, correctness.npz, tables.md, tables.csv, accuracy_vs_gflops.png (of segmenters miou_vs_gflops.png)
                   the report, which `run.py` makes from the files above
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from top_jax import files
from top_jax.ablation.grid import fill_of
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.files import write_json, write_text
from top_jax.pruning import Pruning
from top_jax.training.run_directory import FREE_TO_CHANGE, describe_changes


class Results:
    """Rows of a results directory, locked against other processes until `close`; a context manager.

    Args:
        path: the directory; created if it does not exist.
        settings: from `common_settings`.

    Raises:
        InputError: the directory cannot be written to, is in use, or holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self._file = path / "results.jsonl"
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:  # released again after an error
            try:
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(files.lock(path))
                self._check_same()
                rows = _whole_lines(self._file)
                # Rewritten, because a kill may have cut the last line short.
                write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
                write_json(path / "settings.json", settings)
            except BlockingIOError as error:
                raise InputError(
                    f"{path} is in use by another process or thread; wait for it, or choose another --out."
                ) from error
            except OSError as error:
                raise InputError(f"cannot write to {path} ({error.strerror}); choose another --out.") from error
            self._held = held.pop_all()
        self._rows = {row_key(row): row for row in rows}

    def close(self) -> None:
        """Lets other processes write to the directory."""
        self._held.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return list(self._rows.values())

    def __contains__(self, row: Row) -> bool:
        return row_key(row) in self._rows

    def add(self, row: Row) -> None:
        """Appends a row; when this returns, it is on the disk."""
        with self._file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self._rows[row_key(row)] = row

    def check_weights(self, checkpoint: str, fingerprint: int) -> None:
        """Checks that all rows of a checkpoint come from the same weights.

        Args:
            checkpoint: its path, as given.
            fingerprint: hash of its weights.

        Raises:
            InputError: the directory holds results of other weights of this checkpoint.
        """
        for row in self.rows:
            if row["checkpoint"] == checkpoint and row["weights"] != fingerprint:
                raise InputError(
                    f"{self.path} holds results of other weights of {checkpoint}: it was trained further, or --which "
                    "or --ema differ; choose another --out."
                )

    def _check_same(self) -> None:
        file = self.path / "settings.json"
        if not file.is_file():
            if self._file.is_file():
                raise InputError(f"{self.path} has results.jsonl but no settings.json; choose another --out.")
            return
        stored = json.loads(file.read_text())
        if stored["training"] is None or self.settings["training"] is None:  # one of the two commands did not train
            stored["training"] = self.settings["training"] = stored["training"] or self.settings["training"]
        here, unset = (
            flatten_dict(json.loads(json.dumps(of)), sep=".") for of in (self.settings, RunConfig().to_dict())
        )
        # A setting that an earlier release lacked had its present default.
        there = {key: unset.get(key.removeprefix("training.")) for key in here} | flatten_dict(stored, sep=".")
        changed = [key for key in dict.fromkeys((*here, *there)) if there.get(key) != here.get(key)]
        if changed:
            raise InputError(
                f"{self.path} holds results of other settings ({describe_changes(changed, there, here)}); use the same "
                "settings, or choose another --out."
            )


def common_settings(config: RunConfig, base: Pruning, limit_images: int | None, trains: bool) -> dict[str, Any]:
    """Returns the settings that all results of a directory share: those that change a result and are not in its row.

    Args:
        config: the run config.
        base: the setting that all tables share.
        limit_images: number of images evaluated; None for all.
        trains: whether the models are fine-tuned, so that the training settings matter too.

    Returns:
        JSON values by dotted key; `training` is None without fine-tuning.
    """
    content = {
        key: value for key, value in flatten_dict(config.to_dict(), sep=".").items() if key not in FREE_TO_CHANGE
    }
    of_training = ("batch_size", "augment.", "distillation.", "optimizer.")
    return {
        **{key: value for key, value in content.items() if key.startswith(("model.", "data."))},
        "limit_images": limit_images,
        "base": {name: value for name, value in setting_fields(base).items() if name != "random_seed"},
        "training": {key: content[key] for key in content if key.startswith(of_training)} if trains else None,
    }


def _whole_lines(file: Path) -> list[Row]:
    """Returns the rows of a file up to the first line that is cut short."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


Row = dict[str, Any]
"""One result, as JSON values.

checkpoint, weights (their fingerprint), seed (of the training; null for a file), trained_pruned
after_blocks, keep_ratio, alignment, order, score (the last four null for the dense model), fill (segmenters, pruned)
random_seed (null except for the score `random`)
finetuned (null, or steps, learning_rate, seed and run)
tokens_per_block, gmacs (of the whole model, by convention), backbone_gmacs (segmenters)
images (a count), left_out (indices of unreadable images)
of a classifier: accuracy (from 0 to 1), correct (a count), loss (nats), correct_bits (base64: one bit per evaluated
    image, in order)
of a segmenter: miou, mean_accuracy, pixel_accuracy (from 0 to 1), areas (pixels of each class, by kind), miou_of_images
    (base64: `evaluate.miou_of_images`, one float64 per evaluated image, in order)
"""

UNCHOSEN = {"keep_ratio": None, "alignment": None, "order": None, "score": None, "random_seed": None}


def setting_fields(setting: Pruning) -> Row:
    """Returns the fields of a row that describe its setting."""
    if not setting.after_blocks:
        return {"after_blocks": [], **UNCHOSEN}
    return {
        "after_blocks": list(setting.after_blocks),
        "keep_ratio": list(setting.keep_ratio) if isinstance(setting.keep_ratio, tuple) else setting.keep_ratio,
        "alignment": setting.alignment,
        "order": setting.order,
        "score": setting.score,
        "random_seed": setting.seed if setting.score == "random" else None,
        **({} if (fill := fill_of(setting)) is None else {"fill": fill}),
    }


def label(row: Row) -> str:
    """Returns a row's setting in words, such as `hold, clip, keep 0.7`; for a segmenter also the fill."""
    if not row["after_blocks"]:
        return "dense"
    order = ", score order" if row["order"] == "score" else ""
    fill = f", fill {row['fill']}" if row.get("fill") else ""
    return f"{row['alignment']}{order}, {row['score']}, keep {ratio_text(row['keep_ratio'])}{fill}"


def ratio_of(setting: Row) -> Any:
    """Returns keep_ratio in the form that `Pruning` takes: a tuple where JSON has a list."""
    ratio = setting["keep_ratio"]
    return tuple(ratio) if isinstance(ratio, list) else ratio


def ratio_text(keep_ratio: float | Sequence[float] | None) -> str:
    """Returns `0.8`, or `0.8/0.7` if each prune has a ratio of its own."""
    ratios = keep_ratio if isinstance(keep_ratio, Sequence) else [1.0 if keep_ratio is None else keep_ratio]
    return "/".join(f"{ratio:g}" for ratio in ratios)


def cell_key(row: Row) -> tuple[Any, ...]:
    """Returns the key that rows of one average share: the setting without the seed of `random`, and the fine-tuning."""
    finetuned = row["finetuned"] and (row["finetuned"]["steps"], row["finetuned"]["learning_rate"])
    way = row["alignment"], row["order"], row["score"], row.get("fill")
    return tuple(row["after_blocks"]), ratio_of(row), *way, finetuned


def start_key(row: Row) -> tuple[Any, ...]:
    """Returns the key that two rows must share to be compared: initial weights, and fine-tuning with its seed."""
    finetuned = row["finetuned"]
    return row["weights"], finetuned and (finetuned["steps"], finetuned["learning_rate"], finetuned["seed"])


def row_key(row: Row) -> tuple[Any, ...]:
    """Returns the key that identifies a row."""
    return start_key(row), cell_key(row), row["random_seed"]


def to_bits(correct: np.ndarray) -> str:
    """Returns bool `[images]` as base64 text, one bit per image."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def to_text(values: np.ndarray) -> str:
    """Returns float64 `[images]` as base64 text."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def result_of_images(row: Row) -> np.ndarray:
    """Returns the row's result image by image, bool or float64 `[images]`: accuracy or mIoU is its mean."""
    if "correct_bits" not in row:
        return np.frombuffer(base64.b64decode(row["miou_of_images"]), "<f8")
    packed = np.frombuffer(base64.b64decode(row["correct_bits"]), np.uint8)
    return np.unpackbits(packed, count=row["images"]).astype(bool)
