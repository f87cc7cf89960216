"""The short training that a pruned model may get before it is evaluated, by `top_jax.training.train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from top_jax.ablation.grid import model_of
from top_jax.config import PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models.weights import Weights
from top_jax.pruning import Pruning
from top_jax.training import train
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import read_weights

NEVER: Final = 1e9  # epochs: the run evaluates only at its end
SLOWER: Final = 10  # the config's learning rate is divided by this, unless one is given


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


def tuned_weights(config: RunConfig, workdir: Path) -> Weights:
    """Trains, or resumes a training, and returns the weights after the last step.

    Raises:
        KeyboardInterrupt: a signal ended the training early; its last step is saved.
    """
    if train(config, workdir) is None:
        raise KeyboardInterrupt
    return read_weights(RunDirectory(workdir), "latest")


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
