"""The paper's ablation tables on your checkpoint: alignment, score and keep ratio, as markdown, CSV and a picture.

python -m top_jax.cli.ablate --config configs/vim_s_top.py --checkpoint runs/a [--checkpoint runs/b ...] --out DIR
python -m top_jax.cli.ablate --config configs/vim_s.py --after_blocks=5,10,15 --checkpoint vim_s.pth --out DIR
python -m top_jax.cli.ablate --config ... --checkpoint ... --out DIR --tables=alignment --finetune_steps=200

Several checkpoints are several seeds of one model. The tables cross at the config's pruning; the same command again
goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from top_jax.cli import checkpoint_flag, config_flag, runner
from top_jax.errors import InputError

_CONFIG = config_flag.define()
_CHECKPOINTS = checkpoint_flag.define_several(
    "Run directory, or an official .pth or .safetensors file; repeat it for more seeds of the same model."
)
for _shared in (config_flag, checkpoint_flag):  # so that --help shows them
    flags.adopt_module_key_flags(_shared)
_OUT = flags.DEFINE_string("out", None, "Directory of the results.", required=True)
_TABLES = flags.DEFINE_list("tables", ["alignment", "score", "keep_ratio"], "Which of the three tables.")
_FULL = flags.DEFINE_boolean("full", False, "Every alignment with every score at every keep ratio, instead.")
_AFTER_BLOCKS = flags.DEFINE_list("after_blocks", [], "Blocks to prune after, from 1; by default the config's.")
_KEEP_RATIO = flags.DEFINE_float(
    "keep_ratio", None, "Of the first two tables; by default the config's, or 0.7 where it is dense.", 0.0, 1.0
)
_KEEP_RATIOS = flags.DEFINE_list("keep_ratios", ["0.9", "0.7", "0.5"], "Of the third, beside that one.")
_ALIGNMENTS = flags.DEFINE_list(
    "alignments", None, "By default all: none:score (best tokens first, the naive ViT way), none, hold and decay."
)
_SCORES = flags.DEFINE_list("scores", None, "By default all that the model has, and the controls random and uniform.")
_RANDOM_SEEDS = flags.DEFINE_integer("random_seeds", 3, "Of the control random.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit_images", None, "Only the first so many test images.", lower_bound=1)
_STEPS = flags.DEFINE_integer("finetune_steps", None, "Then also after so many steps of training.", lower_bound=1)
_RATE = flags.DEFINE_float("finetune_learning_rate", None, "Of these; by default a tenth of the config's.", 0.0)
_SEEDS = flags.DEFINE_list("finetune_seeds", ["0"], "Of these: one training for each.")


def main(arguments: list[str]) -> None:
    """Makes the grid, runs it, prints its tables."""
    runner.no_more(arguments)
    config = config_flag.read(_CONFIG)
    from top_jax import ablation
    from top_jax.ablation.grid import default_alignments, default_scores

    after_blocks = [_number("after_blocks", block, int) for block in _AFTER_BLOCKS.value]
    base = ablation.base_pruning(config, after_blocks=after_blocks, keep_ratio=_KEEP_RATIO.value)
    grid = ablation.make_grid(
        base,
        tables=_TABLES.value,
        full=_FULL.value,
        alignments=_ALIGNMENTS.value or default_alignments(config),
        scores=_SCORES.value or default_scores(config),
        keep_ratios=[_number("keep_ratios", ratio, float) for ratio in _KEEP_RATIOS.value],
        random_seeds=_RANDOM_SEEDS.value,
    )
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
        progress=runner.progress,
    )
    out = Path(_OUT.value)
    print(f"\n{(out / 'tables.md').read_text()}\n{out}: tables.md, tables.csv, accuracy_vs_gflops.png, results.json")


def _finetune() -> Any:
    """What the flags of fine-tuning ask for; None where it is not asked for."""
    from top_jax.ablation import Finetune

    if _STEPS.value is None:
        if _RATE.value is not None or _SEEDS.value != ["0"]:
            raise InputError("--finetune_learning_rate and --finetune_seeds do nothing without --finetune_steps.")
        return None
    seeds = tuple(_number("finetune_seeds", seed, int) for seed in _SEEDS.value)
    return Finetune(_STEPS.value, _RATE.value, seeds)


def _number(flag: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{flag}: {text!r} is none of the {what} that it needs, with commas between.") from error


if __name__ == "__main__":
    runner.run(main)
