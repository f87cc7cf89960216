"""Runs an ablation: evaluates each setting on each checkpoint once, continues after an interruption, and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.ablation.evaluate import EvaluationImages, Program
from top_jax.ablation.grid import DENSE, check_settings, model_of, program_key
from top_jax.ablation.picture import draw
from top_jax.ablation.results import Results, Row, common_settings, label, result_of_images, setting_fields
from top_jax.ablation.statistics import summarise
from top_jax.ablation.tables import arrange, as_csv, markdown
from top_jax.build import build_abstract_model, crop_size
from top_jax.config import PruningConfig, RunConfig
from top_jax.environment import environment
from top_jax.errors import InputError
from top_jax.evaluation.flops.of_config import cost_of
from top_jax.files import write_arrays, write_json, write_text
from top_jax.models.weights import Weights
from top_jax.pruning import Pruning
from top_jax.training import train
from top_jax.training.prepare import open_split
from top_jax.training.programs import enable_compilation_cache
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import find_weights
from top_jax.training.seals import fingerprint
from top_jax.training.tasks import task_of
from top_jax.training.weights import read_weights
from top_jax.values import counted

NEVER: Final = 1e9  # epochs: the run evaluates only at its end
SLOWER: Final = 10  # the config's learning rate is divided by this, unless one is given

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`top_jax.cli.terminal.progress`: takes a name and a total, and yields a function that advances the bar."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Length, learning rate and seeds of the fine-tuning.

    Attributes:
        steps: number of steps, each of `config.batch_size` images.
        learning_rate: the peak learning rate; None for a tenth of the config's.
        seeds: each setting is trained once per seed. The dense model is trained too, as the control.

    Raises:
        InputError: less than one step, no seed, or the same seed twice.
    """

    steps: int
    learning_rate: float | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"finetune_steps={self.steps} with finetune_seeds={list(self.seeds)}; needed: at least 1 step and at "
                "least 1 seed, no seed twice."
            )


class Checkpoint(NamedTuple):
    """The weights of one model.

    Attributes:
        path: the path, as given.
        weights: all weights of the model.
        fingerprint: hash of the weights.
        seed: seed of its training; None if it is not known (a file).
        trained_pruned: whether it was trained with pruning; then the dense model is not the one that was trained.
    """

    path: str
    weights: Weights
    fingerprint: int
    seed: int | None
    trained_pruned: bool


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
    progress: ProgressBar = lambda what, total: contextlib.nullcontext(lambda count: None),
) -> list[Row]:
    """Evaluates each setting on each checkpoint over the config's evaluation split, and writes the report.

    All settings are evaluated without training first; with `finetune`, each is then evaluated after a fine-tuning of
    its own. The dense model is always included. Results that `out` already holds are not computed again. Each result
    is written as soon as it is known, so that an interruption loses only the evaluation in progress.

    Args:
        config: model, data and training; its pruning is ignored.
        checkpoints: run directories or official files; several are different seeds of one model.
        settings: from `make_grid`.
        out: the directory of the results (`results.py`); created if it does not exist.
        base: the setting that all tables share, from `base_pruning`.
        limit_images: use only the first `limit_images` images; None for all.
        finetune: the fine-tuning; None for no training.
        which: which weights of a run directory to use, `best` or `latest`.
        ema: whether to use averaged weights; None uses them if the run has them.
        say: called with one line of text at the start and for each result.
        progress: makes a progress bar.

    Returns:
        All rows of `out` (`Row`), including those of earlier commands.

    Raises:
        InputError: bad input, before anything is evaluated.
        KeyboardInterrupt: the user or a signal stopped the ablation, possibly during a fine-tuning.
    """
    settings = tuple(dict.fromkeys((DENSE, *settings)))
    check_settings(config, settings)
    if finetune is not None and (which != "best" or ema is not None):
        raise InputError("fine-tuning starts from the weights that train.py would use; leave out --which and --ema.")
    images = _open_images(config, limit_images)
    loaded = [_load(path, config, which, ema, images.class_names) for path in checkpoints]
    _check_different(loaded)
    with Results(Path(out), common_settings(config, base, limit_images, finetune is not None)) as results:
        for checkpoint in loaded:
            results.check_weights(checkpoint.path, checkpoint.fingerprint)
        enable_compilation_cache()
        say(
            f"{len(settings)} settings x {counted(len(loaded), 'checkpoint')}, pruned after blocks "
            f"{', '.join(map(str, base.after_blocks))}; {images.count} images; {len(results.rows)} results found"
        )
        ablation = _Ablation(config, images, results, say)
        ablation.evaluate_all(loaded, settings, progress)
        if finetune is not None:
            write_report(results, config)
            ablation.finetune_all(loaded, settings, finetune)
        write_report(results, config)
        return results.rows


class _Ablation:
    """Computes the missing results of one directory."""

    def __init__(self, config: RunConfig, images: EvaluationImages, results: Results, say: Callable[[str], None]):
        self._config, self._images, self._results, self._say = config, images, results, say
        self._task = task_of(config.model)

    def evaluate_all(self, checkpoints: list[Checkpoint], settings: tuple[Pruning, ...], progress: ProgressBar) -> None:
        """Evaluates every setting on every checkpoint, without training."""
        todo = [(s, c) for s, c in itertools.product(settings, checkpoints) if self._blank(s, c) not in self._results]
        with progress("settings", len(todo)) as advance:
            for run, setting, checkpoint in self._with_programs(todo):
                self._add(run, setting, checkpoint.weights, self._blank(setting, checkpoint))
                advance(1)

    def finetune_all(self, checkpoints: list[Checkpoint], settings: tuple[Pruning, ...], finetune: Finetune) -> None:
        """Fine-tunes and evaluates every setting on every checkpoint, once per seed."""
        todo = []
        for setting, checkpoint, seed in itertools.product(settings, checkpoints, finetune.seeds):
            config = config_of(self._config, checkpoint.path, setting, finetune, seed)
            tuned = {"steps": finetune.steps, "learning_rate": config.optimizer.learning_rate, "seed": seed}
            row = self._blank(setting, checkpoint, tuned)
            if row not in self._results:
                todo.append((setting, (config, row)))
        start = time.monotonic()
        for done, (run, setting, (config, row)) in enumerate(self._with_programs(todo)):
            name = run_name(row["weights"], row, config.seed)
            left = (len(todo) - done) * (time.monotonic() - start) / max(done, 1) / 60
            self._say(f"fine-tuning {done + 1} of {len(todo)}: {name}" + f"; about {left:.0f} min left" * (done > 0))
            row["finetuned"]["run"] = f"runs/{name}"
            workdir = self._results.path / "runs" / name
            if train(config, workdir) is None:  # a signal ended it early; its last step is saved
                raise KeyboardInterrupt
            self._add(run, setting, read_weights(RunDirectory(workdir), "latest"), row)

    def _with_programs(self, todo: list[tuple[Pruning, Any]]) -> Iterator[tuple[Program, Pruning, Any]]:
        """Yields each piece of work with its program; only one program is kept in memory at a time."""
        for _, alike in itertools.groupby(todo, key=lambda work: program_key(work[0])):
            work = list(alike)
            first = work[0][0]
            model = build_abstract_model(model_of(self._config.model, first), first)
            shared = Program(model, [setting for setting, _ in work], self._config.data)
            yield from ((shared, setting, other) for setting, other in work)

    def _blank(self, setting: Pruning, checkpoint: Checkpoint, finetuned: Row | None = None) -> Row:
        """Returns a row without its outcome."""
        cost = cost_of(self._config, setting)
        return {
            "checkpoint": checkpoint.path,
            "weights": checkpoint.fingerprint,
            "seed": checkpoint.seed,
            "trained_pruned": checkpoint.trained_pruned,
            **setting_fields(setting),
            "finetuned": finetuned,
            "tokens_per_block": list(cost.tokens_per_block),
            **cost.in_gmacs(),
        }

    def _add(self, run: Program, setting: Pruning, weights: Weights, row: Row) -> None:
        row = {**row, **run.evaluate(setting, weights, self._images)}
        self._results.add(row)
        seed = "" if row["random_seed"] is None else f", seed {row['random_seed']}"
        result = f"{self._task.title} {row[self._task.score]:.2%} on {row['images']} images"
        self._say(f"{label(row)}{seed}: {result}, {row['checkpoint']}")


def _open_images(config: RunConfig, limit: int | None) -> EvaluationImages:
    source = open_split(config, train=False, advice="ablate it on the data it was trained for")
    batch_size = config.eval_batch_size or config.batch_size
    return EvaluationImages(source, config.data, img_size=crop_size(config), batch_size=batch_size, limit=limit)


def _load(
    path: str | Path, config: RunConfig, which: str, ema: bool | None, class_names: tuple[str, ...]
) -> Checkpoint:
    saved = find_weights(path, config.model.name)
    weights = saved.for_model(config.model, which=which, ema=ema, class_names=class_names)
    trained = saved.trained
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
                f"checkpoints {seen[checkpoint.fingerprint]} and {checkpoint.path} have the same weights, so they are "
                "not two seeds of a model; leave one out."
            )
        seen[checkpoint.fingerprint] = checkpoint.path


def write_report(results: Results, config: RunConfig) -> None:
    """Writes results.json, correctness.npz, tables.md, tables.csv and the picture (`picture_name`).

    correctness.npz holds for each row of results.json `correct`, uint8 `[rows, bytes]`, with one bit per image
    (`np.unpackbits(correct, axis=1, count=images)`), or of a segmenter `miou_of_images`, float64 `[rows, images]`; and
    `index`, int64 `[images]`, the images' indices in the source.

    Args:
        results: the rows, and the directory to write to.
        config: the run config.

    Raises:
        OSError: a file cannot be written.
    """
    rows, path, base = results.rows, results.path, results.settings["base"]
    cells = summarise(rows)
    tables = arrange(cells, base)
    about = {"environment": environment(), "date": datetime.date.today().isoformat(), "settings": results.settings}
    content = {
        **about,
        "rows": [_without_images(row) for row in rows],
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    write_json(path / "results.json", content)
    write_text(path / "tables.md", markdown(tables, rows, _in_words(about, rows, config)))
    write_text(path / "tables.csv", as_csv(tables))
    write_arrays(path / "correctness.npz", _correctness(rows))
    draw(cells, base, path / picture_name(config))


def picture_name(config: RunConfig) -> str:
    """Returns the file name of the picture: accuracy_vs_gflops.png, or miou_vs_gflops.png."""
    return f"{task_of(config.model).score}_vs_gflops.png"


def _correctness(rows: list[Row]) -> dict[str, np.ndarray]:
    images, missing = rows[0]["images"], rows[0]["left_out"]
    index = np.setdiff1d(np.arange(images + len(missing)), missing)
    results = np.stack([result_of_images(row) for row in rows])
    if results.dtype == bool:
        return {"correct": np.packbits(results, axis=1), "index": index}
    return {"miou_of_images": results, "index": index}


def _in_words(about: dict[str, Any], rows: list[Row], config: RunConfig) -> str:
    pruned = {row["checkpoint"]: " (trained with pruning)" * row["trained_pruned"] for row in rows}
    checkpoints = ", ".join(f"{name}{how}" for name, how in pruned.items())
    where = about["environment"]
    data = config.data.name or config.data.source
    return (
        f"{config.model.name} on {data}/{config.data.eval_split}, {rows[0]['images']} images; checkpoints "
        f"{checkpoints}; {where['devices']} x {where['device']}, JAX {where['packages']['jax']}, {about['date']}."
    )


def _without_images(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("correct_bits", "miou_of_images")}


def config_of(config: RunConfig, checkpoint: str, setting: Pruning, finetune: Finetune, seed: int) -> RunConfig:
    """Returns the config of one fine-tuning: `config` with other initial weights, length, learning rate and pruning.

    It keeps no average of the weights: after so few steps the average would still be close to the initial weights.

    Args:
        config: the config of the original run.
        checkpoint: path of the initial weights.
        setting: how tokens are pruned.
        finetune: length and learning rate.
        seed: seed of the fine-tuning.
    """
    optimizer = config.optimizer
    rate = optimizer.learning_rate / SLOWER if finetune.learning_rate is None else finetune.learning_rate
    return dataclasses.replace(
        config,
        seed=seed,
        init_from=checkpoint,
        total_steps=finetune.steps,
        eval_every_epochs=NEVER,
        model=model_of(config.model, setting),
        pruning=_pruning_config(setting),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=rate,
            min_learning_rate=min(optimizer.min_learning_rate, rate),
            warmup_learning_rate=min(optimizer.warmup_learning_rate, rate),
            ema_decay=None,
        ),
    )


def run_name(weights: int, row: dict[str, Any], seed: int) -> str:
    """Returns the name of a run directory: fingerprint of the initial weights, setting, fine-tuning and seed."""
    ratio = row["keep_ratio"]
    ratios = "-".join(f"{r:g}" for r in ratio) if isinstance(ratio, list) else f"{ratio or 1:g}"
    named = [row["alignment"], row["order"], row["score"], row["random_seed"], row.get("fill")]
    parts = [str(part) for part in named if part is not None] or ["dense"]
    tuned = row["finetuned"]
    return "_".join([f"{weights:08x}", *parts, ratios, f"{tuned['steps']}x{tuned['learning_rate']:g}", f"seed{seed}"])


def _pruning_config(setting: Pruning) -> PruningConfig:
    if not setting.after_blocks:
        return PruningConfig()
    settings = {field.name: getattr(setting, field.name) for field in dataclasses.fields(Pruning)}
    if not isinstance(setting.keep_ratio, tuple):
        settings["keep_ratio"] = (setting.keep_ratio,)
    return PruningConfig(**settings)
