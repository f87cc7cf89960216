"""Runs an ablation: each setting on each checkpoint, once, whatever stops it in between."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from top_jax.ablation import finetune as tuning
from top_jax.ablation.evaluate import Images, Program, counted, left_out
from top_jax.ablation.finetune import Finetune
from top_jax.ablation.grid import DENSE, check_settings, program
from top_jax.ablation.picture import draw
from top_jax.ablation.results import Results, Row, common_settings, describe, from_bits, label, to_bits
from top_jax.ablation.statistics import summarise
from top_jax.ablation.tables import arrange, as_csv, markdown
from top_jax.build import build_abstract_model, build_sizes
from top_jax.config import RunConfig
from top_jax.data import check_classes, open_source
from top_jax.environment import environment
from top_jax.errors import InputError
from top_jax.evaluation.flops import count_macs
from top_jax.files import write_json, write_text
from top_jax.models.weights import Weights
from top_jax.pruning import Pruning
from top_jax.sharding import make_mesh, replicated
from top_jax.training.compilation_cache import enable_compilation_cache
from top_jax.training.fingerprint import fingerprint
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import checkpoint_weights

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""As `top_jax.cli.runner.progress`: a name and a total, and what moves it on by so many."""


class Checkpoint(NamedTuple):
    """Weights of one of the models that are compared.

    Attributes:
        path: as it was given.
        weights: all of the model's.
        fingerprint: of them.
        seed: of its training; None where it is not known (a file).
        trained_pruned: whether it was pruned when it was trained, so that the dense model is not the one it was.
    """

    path: str
    weights: Weights
    fingerprint: int
    seed: int | None
    trained_pruned: bool


@contextlib.contextmanager
def _no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    del what, total
    yield lambda count: None


def run_ablation(
    config: RunConfig,
    checkpoints: Sequence[str | Path],
    settings: Sequence[Pruning],
    out: str | Path,
    *,
    base: Pruning,
    limit_images: int | None = None,
    finetune: Finetune | None = None,
    which: str = "best",
    ema: bool | None = None,
    say: Callable[[str], None] = print,
    progress: ProgressBar = _no_bar,
) -> list[Row]:
    """Evaluates each setting on each checkpoint over the config's evaluation split, and reports.

    First all settings without training, then, if asked to, each after a fine-tuning of its own. The dense model is
    always among them. What `out` holds already is not done again; at any moment it holds all that was done, but for
    what was being evaluated.

    Args:
        config: model, data, and how to train; its pruning is not looked at.
        checkpoints: run directories or official files: several are several seeds of one model.
        settings: as of `make_grid`.
        out: the directory of the results (`results.py`); made if need be.
        base: the point at which the tables cross.
        limit_images: only the first so many images.
        finetune: how; None does not train.
        which: `best` or `latest`, of a run directory.
        ema: averaged weights; None takes them where a run kept them.
        say: takes one line at the start and for each result.
        progress: makes a progress bar.

    Returns:
        All rows of `out` (`rows.py`), those of earlier commands included.

    Raises:
        InputError: bad input, before anything is evaluated.
        KeyboardInterrupt: also where a signal ended a fine-tuning early.
    """
    settings = tuple(dict.fromkeys((DENSE, *settings)))
    check_settings(config, settings)
    if finetune is not None and (which != "best" or ema is not None):
        raise InputError("fine-tuning starts from the weights that train.py would; leave out --which and --ema.")
    images = _open_images(config, limit_images)
    loaded = [_load(path, config, which, ema) for path in checkpoints]
    _check_different(loaded)
    results = Results(Path(out), common_settings(config, base, limit_images, finetune is not None))
    for checkpoint in loaded:
        results.check_weights(checkpoint.path, checkpoint.fingerprint)
    enable_compilation_cache()
    how = "read once" if images.held else "too many to hold, so that they are read anew for every result"
    say(
        f"{len(settings)} settings x {len(loaded)} checkpoint{'s' * (len(loaded) > 1)}, pruned after blocks "
        f"{', '.join(map(str, base.after_blocks))}; {images.count} images, {how}; {len(results.rows)} results are there"
    )
    ablation = _Ablation(config, images, results, say)
    ablation.evaluate_all(loaded, settings, progress)
    if finetune is not None:
        write_report(results, config)
        ablation.finetune_all(loaded, settings, finetune)
    write_report(results, config)
    return results.rows


class _Ablation:
    def __init__(self, config: RunConfig, images: Images, results: Results, say: Callable[[str], None]):
        self._config, self._images, self._results, self._say = config, images, results, say
        self._sizes = build_sizes(config.model)

    def evaluate_all(self, checkpoints: list[Checkpoint], settings: tuple[Pruning, ...], progress: ProgressBar) -> None:
        """Every setting on every checkpoint, without training."""
        todo = [(s, c) for s, c in itertools.product(settings, checkpoints) if self._blank(s, c) not in self._results]
        with progress("settings", len(todo)) as advance:
            for run, setting, checkpoint in self._with_programs(todo):
                self._add(run, setting, checkpoint.weights, self._blank(setting, checkpoint))
                advance(1)

    def finetune_all(self, checkpoints: list[Checkpoint], settings: tuple[Pruning, ...], finetune: Finetune) -> None:
        """Every setting on every checkpoint, each trained for itself with every seed."""
        todo = []
        for setting, checkpoint, seed in itertools.product(settings, checkpoints, finetune.seeds):
            config = tuning.config_of(self._config, checkpoint.path, setting, finetune, seed)
            tuned = {"steps": finetune.steps, "learning_rate": config.optimizer.learning_rate, "seed": seed}
            row = self._blank(setting, checkpoint, tuned)
            if row not in self._results:
                todo.append((setting, (config, row)))
        start = time.monotonic()
        for done, (run, setting, (config, row)) in enumerate(self._with_programs(todo)):
            name = tuning.run_name(row["weights"], row, config.seed)
            left = (len(todo) - done) * (time.monotonic() - start) / max(done, 1) / 60
            self._say(f"fine-tuning {done + 1} of {len(todo)}: {name}" + f"; about {left:.0f} min left" * (done > 0))
            row["finetuned"]["run"] = f"runs/{name}"
            weights = tuning.tuned_weights(config, self._results.path / "runs" / name)
            self._add(run, setting, weights, row)

    def _with_programs(self, todo: list[tuple[Pruning, Any]]) -> Iterator[tuple[Program, Pruning, Any]]:
        """What is to be done, with its program; one of them is held at a time."""
        for _, alike in itertools.groupby(todo, key=lambda work: program(work[0])):
            work = list(alike)
            first = work[0][0]
            model = build_abstract_model(self._config.model, first)
            shared = Program(nnx.graphdef(model), [setting for setting, _ in work], self._config.data)
            yield from ((shared, setting, other) for setting, other in work)

    def _blank(self, setting: Pruning, checkpoint: Checkpoint, finetuned: Row | None = None) -> Row:
        """A row before its numbers."""
        cost = count_macs(self._sizes, setting)
        return {
            "checkpoint": checkpoint.path,
            "weights": checkpoint.fingerprint,
            "seed": checkpoint.seed,
            "trained_pruned": checkpoint.trained_pruned,
            **describe(setting),
            "finetuned": finetuned,
            "tokens_per_block": list(cost.tokens_per_block),
            "gmacs": {name: cost.gmacs(name) for name in cost.macs},
        }

    def _add(self, run: Program, setting: Pruning, weights: Weights, row: Row) -> None:
        row = {**row, **_evaluate(run, setting, weights, self._images)}
        self._results.add(row)
        seed = "" if row["random_seed"] is None else f", seed {row['random_seed']}"
        self._say(f"{label(row)}{seed}: {row['accuracy']:.2%} of {row['images']} images, {row['checkpoint']}")


def _evaluate(run: Program, setting: Pruning, weights: Weights, images: Images) -> dict[str, Any]:
    """Accuracy, and which images were right."""
    weights = jax.device_put(weights, replicated(make_mesh()))
    outcomes = [(counted(batch), left_out(batch), run(setting, weights, batch)) for batch in images]
    correct = np.concatenate([np.asarray(outcome.correct)[mask] for mask, _, outcome in outcomes]).astype(bool)
    loss = np.concatenate([np.asarray(outcome.loss)[mask] for mask, _, outcome in outcomes])
    return {
        "accuracy": float(np.mean(correct)),
        "correct": int(np.sum(correct)),
        "images": len(correct),
        "loss": float(np.mean(loss, dtype=np.float64)),
        "left_out": list(itertools.chain.from_iterable(indices for _, indices, _ in outcomes)),
        "correct_bits": to_bits(correct),
    }


def _open_images(config: RunConfig, limit: int | None) -> Images:
    source = open_source(config.data, train=False)
    check_classes(source, config.model.num_classes, "ablate it on the data it was trained for")
    size = build_sizes(config.model).img_size
    batch_size = config.eval_batch_size or config.batch_size
    return Images(source, config.data, img_size=size, batch_size=batch_size, limit=limit)


def _load(path: str | Path, config: RunConfig, which: str, ema: bool | None) -> Checkpoint:
    weights = checkpoint_weights(path, config.model, which=which, ema=ema)
    trained = RunDirectory(path).read_config() if Path(path).is_dir() else None
    return Checkpoint(
        path=str(path),
        weights=weights,
        fingerprint=fingerprint(weights),
        seed=None if trained is None else trained.seed,
        trained_pruned=trained is not None and bool(trained.pruning.after_blocks),
    )


def _check_different(checkpoints: list[Checkpoint]) -> None:
    seen: dict[int, str] = {}
    for checkpoint in checkpoints:
        if checkpoint.fingerprint in seen:
            raise InputError(
                f"checkpoints {seen[checkpoint.fingerprint]} and {checkpoint.path} have the same weights, and are no "
                "two seeds of a model; leave one out."
            )
        seen[checkpoint.fingerprint] = checkpoint.path


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
