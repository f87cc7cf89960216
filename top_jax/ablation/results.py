"""The directory of an ablation, by which the same command goes on where it stopped.

settings.json      what all results have in common
results.jsonl      one line per result, appended as they come
runs/              of the fine-tuning
results.json, correctness.npz, tables.md, tables.csv, accuracy_vs_gflops.png    made of these (`report.py`)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from top_jax.ablation.rows import Row, describe, identity
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
