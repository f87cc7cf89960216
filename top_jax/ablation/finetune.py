"""The short training that a setting's model may get before it is evaluated, through `top_jax.training.train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from top_jax.config import PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models.weights import Weights
from top_jax.pruning import Pruning
from top_jax.training import train
from top_jax.training.run_directory import RunDirectory
from top_jax.training.saved_weights import read_weights

NEVER: Final = 1e9  # epochs: the run evaluates once, when it has ended
SLOWER: Final = 10  # than the config's learning rate, unless it is given


@dataclasses.dataclass(frozen=True)
class Finetune:
    """How long, how fast, and how often.

    Attributes:
        steps: of `config.batch_size` images each.
        learning_rate: at its peak; None is a tenth of the config's.
        seeds: one training each, of each setting (the dense model too: what training on does for it is the control).
    """

    steps: int
    learning_rate: float | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"finetune_steps={self.steps} with finetune_seeds={list(self.seeds)}; needed: at least 1 step, and "
                "seeds of which no two are alike."
            )


def config_of(config: RunConfig, checkpoint: str, setting: Pruning, finetune: Finetune, seed: int) -> RunConfig:
    """The run: that of `config` with another start, length, rate and pruning.

    No average of the weights is kept: over so few steps it would hardly leave the ones it starts from.
    """
    optimizer = config.optimizer
    rate = optimizer.learning_rate / SLOWER if finetune.learning_rate is None else finetune.learning_rate
    return dataclasses.replace(
        config,
        seed=seed,
        init_from=checkpoint,
        total_steps=finetune.steps,
        eval_every_epochs=NEVER,
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
    """Trains, or goes on, and returns the weights after the last step.

    Raises:
        KeyboardInterrupt: a signal ended the training early; what it reached is saved.
    """
    if train(config, workdir) is None:
        raise KeyboardInterrupt
    return read_weights(RunDirectory(workdir), "latest")


def run_name(weights: int, row: dict[str, Any], seed: int) -> str:
    """Of the run directory: the weights it starts from, the setting and the seed."""
    ratio = row["keep_ratio"]
    ratios = "-".join(f"{r:g}" for r in ratio) if isinstance(ratio, list) else f"{ratio or 1:g}"
    named = [row["alignment"], row["order"], row["score"], row["random_seed"]]
    parts = [str(part) for part in named if part is not None] or ["dense"]
    tuned = row["finetuned"]
    return "_".join([f"{weights:08x}", *parts, ratios, f"{tuned['steps']}x{tuned['learning_rate']:g}", f"seed{seed}"])


def _pruning_config(setting: Pruning) -> PruningConfig:
    if not setting.after_blocks:
        return PruningConfig()
    return PruningConfig(
        after_blocks=setting.after_blocks,
        keep_ratio=setting.keep_ratio if isinstance(setting.keep_ratio, tuple) else (setting.keep_ratio,),
        score=setting.score,
        alignment=setting.alignment,
        order=setting.order,
        seed=setting.seed,
    )
