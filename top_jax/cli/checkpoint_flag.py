"""The flags --checkpoint, --which and --ema of the commands that run a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from top_jax.config import RunConfig


def define(help_text: str = "Run directory, or an official .pth or .safetensors file.") -> flags.FlagHolder[Any]:
    """The flag --checkpoint, required, and the two that choose among its weights."""
    _define_choice()
    return flags.DEFINE_string("checkpoint", None, help_text, required=True)


def define_several(help_text: str) -> flags.FlagHolder[Any]:
    """The same, where --checkpoint may be given more than once."""
    _define_choice()
    return flags.DEFINE_multi_string("checkpoint", None, help_text, required=True)


def load_model(checkpoint: str | Path, config: RunConfig) -> Any:
    """The config's model with its reduction of tokens, in eval mode, with the weights that the flags choose.

    Raises:
        InputError: nothing there, weights of another model or class count, or a reduction that the model cannot have.
    """
    from top_jax.build import build_abstract_model, build_reduction
    from top_jax.training.weights import checkpoint_weights, fill

    reduction = build_reduction(config.pruning)
    shapes = build_abstract_model(config.model, reduction)
    weights = checkpoint_weights(checkpoint, config.model, which=flags.FLAGS.which, ema=flags.FLAGS.ema)
    return fill(shapes, weights)


def _define_choice() -> None:
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Which checkpoint of a run directory.")
    flags.DEFINE_boolean("ema", None, "Averaged weights; by default where a run kept them, and not of a file.")
