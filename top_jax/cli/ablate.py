"""The paper's ablation tables on your checkpoint: alignment, score and keep ratio, as markdown, CSV and a picture.

A segmenter's result is its mIoU, and a fourth table compares the fills of its maps.

top-jax ablate --config configs/vim_s_top.py --checkpoint runs/a [--checkpoint runs/b ...] --out DIR
top-jax ablate --config configs/vim_s.py --after_blocks=5,10,15 --checkpoint vim_s.pth --out DIR
top-jax ablate --config ... --checkpoint ... --out DIR --tables=alignment --finetune_steps=200
top-jax ablate --checkpoint runs/seg_digits_top --out DIR --tables=fill

Several checkpoints count as seeds of one model. All tables share the config's pruning setting. Start the same command
again to resume where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from top_jax import files
from top_jax.cli import runner, shared_flags, terminal
from top_jax.errors import InputError
from top_jax.optional import require

_CONFIG = shared_flags.define_config()
_CHECKPOINTS = shared_flags.define_checkpoints("Repeat it for more seeds of the same model.")
_OUT = flags.DEFINE_string("out", None, "Directory for the results.", required=True)
_TABLES = flags.DEFINE_list(
    "tables", None, "Tables to make: alignment, score, keep_ratio, and fill for segmenters; by default all."
)
_FULL = flags.DEFINE_boolean(
    "full", False, "Run every alignment with every score at every keep ratio (and fill) instead of the tables."
)
_AFTER_BLOCKS = flags.DEFINE_list(
    "after_blocks", [], "Blocks to prune after, from 1, such as 5,10,15; by default the config's."
)
_KEEP_RATIO = flags.DEFINE_float(
    "keep_ratio",
    None,
    "Keep ratio of the alignment and score tables; by default the config's, or 0.7 if it is dense.",
    0.0,
    1.0,
)
_KEEP_RATIOS = flags.DEFINE_list("keep_ratios", ["0.9", "0.7", "0.5"], "Extra keep ratios for the keep-ratio table.")
_ALIGNMENTS = flags.DEFINE_list(
    "alignments", None, "Alignments to compare; by default none:score (naive: best tokens first), none, hold and decay."
)
_SCORES = flags.DEFINE_list(
    "scores", None, "Scores to compare; by default all of the model's, and the controls random and uniform."
)
_FILLS = flags.DEFINE_list(
    "fills",
    None,
    "How a segmenter's maps are filled where tokens were dropped; by default frozen, nearest, carry and zero.",
)
_RANDOM_SEEDS = flags.DEFINE_integer("random_seeds", 3, "Number of seeds of the control random.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit_images", None, "Use only the first N test images.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "finetune_steps", None, "Also fine-tune each setting for N steps and evaluate it again.", lower_bound=1
)
_RATE = flags.DEFINE_float(
    "finetune_learning_rate", None, "Learning rate of fine-tuning; by default a tenth of the config's.", 0.0
)
_SEEDS = flags.DEFINE_list("finetune_seeds", ["0"], "Fine-tuning seeds, one run each.")


def main(arguments: list[str]) -> None:
    """Makes the grid of settings, runs it and prints its tables."""
    runner.no_more(arguments)
    require("grain", "matplotlib", purpose="ablate")
    files.check_folder(_OUT.value, f"--out={_OUT.value}")
    config = shared_flags.read_config(_CONFIG, own_pruning=not _AFTER_BLOCKS.value)
    shared_flags.check_data_is_known()
    from top_jax import ablation
    from top_jax.ablation.grid import default_alignments, default_scores
    from top_jax.ablation.run import picture_name

    after_blocks = [_number("after_blocks", block, int) for block in _AFTER_BLOCKS.value]
    base = ablation.base_pruning(config, after_blocks=after_blocks, keep_ratio=_KEEP_RATIO.value)
    grid = ablation.make_grid(
        base,
        tables=_TABLES.value,
        full=_FULL.value,
        alignments=_ALIGNMENTS.value or default_alignments(config),
        scores=_SCORES.value or default_scores(config),
        keep_ratios=[_number("keep_ratios", ratio, float) for ratio in _KEEP_RATIOS.value],
        fills=_FILLS.value,
        random_seeds=_RANDOM_SEEDS.value,
    )
    shared_flags.warn_of_changes(config, pruning=not _AFTER_BLOCKS.value)
    ablation.run_ablation(
        config,
        _CHECKPOINTS.value,
        grid,
        _OUT.value,
        base=base,
        limit_images=_LIMIT.value,
        finetune=_finetune(),
        which=flags.FLAGS.which,
        ema=flags.FLAGS.ema,
        progress=terminal.progress,
    )
    out = Path(_OUT.value)
    print(f"\n{(out / 'tables.md').read_text()}\n{out}: tables.md, tables.csv, {picture_name(config)}, results.json")


def _finetune() -> Any:
    """Returns the fine-tuning that the flags ask for, or None."""
    from top_jax.ablation import Finetune

    if _STEPS.value is None:
        if _RATE.value is not None or _SEEDS.value != ["0"]:
            raise InputError("--finetune_learning_rate and --finetune_seeds have no effect without --finetune_steps.")
        return None
    seeds = tuple(_number("finetune_seeds", seed, int) for seed in _SEEDS.value)
    return Finetune(_STEPS.value, _RATE.value, seeds)


def _number(flag: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{flag} needs comma-separated {what}; got {text!r}.") from error


if __name__ == "__main__":
    runner.run(main)
