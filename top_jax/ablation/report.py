"""Everything that is made of the rows of a directory."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np

from top_jax.ablation.picture import draw
from top_jax.ablation.results import Results
from top_jax.ablation.rows import Row, from_bits
from top_jax.ablation.statistics import summarise
from top_jax.ablation.tables import arrange, as_csv, markdown
from top_jax.config import RunConfig
from top_jax.environment import environment
from top_jax.files import write_json, write_text


def write_report(results: Results, config: RunConfig) -> None:
    """Writes results.json, correctness.npz, tables.md, tables.csv and accuracy_vs_gflops.png.

    correctness.npz has, for the rows of results.json in their order: `correct` uint8 [rows, bytes], one bit per image
    (`np.unpackbits(correct, axis=1, count=images)`), and `index` int64 [images], the images' places in the source.
    """
    rows, path, base = results.rows, results.path, results.settings["base"]
    cells = summarise(rows)
    tables = arrange(cells, base)
    about = {"environment": environment(), "date": datetime.date.today().isoformat(), "settings": results.settings}
    content = {
        **about,
        "rows": [_without_bits(row) for row in rows],
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    write_json(path / "results.json", content)
    write_text(path / "tables.md", markdown(tables, rows, _in_words(about, rows, config)))
    write_text(path / "tables.csv", as_csv(tables))
    np.savez_compressed(path / "correctness.npz", **_correctness(rows))
    draw(cells, base, path / "accuracy_vs_gflops.png")


def _correctness(rows: list[Row]) -> dict[str, Any]:
    images, missing = rows[0]["images"], rows[0]["left_out"]
    index = np.setdiff1d(np.arange(images + len(missing)), missing)
    return {"correct": np.stack([np.packbits(from_bits(row)) for row in rows]), "index": index}


def _in_words(about: dict[str, Any], rows: list[Row], config: RunConfig) -> str:
    pruned = {row["checkpoint"]: " (pruned in its own training)" * row["trained_pruned"] for row in rows}
    checkpoints = ", ".join(f"{name}{how}" for name, how in pruned.items())
    where = about["environment"]
    data = config.data.name or config.data.source
    return (
        f"{config.model.name} on {data}/{config.data.eval_split}, {rows[0]['images']} images; checkpoints "
        f"{checkpoints}; {where['devices']} x {where['device']}, JAX {where['packages']['jax']}, {about['date']}."
    )


def _without_bits(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "correct_bits"}
