"""Training: a run from its config to its summary."""

from top_jax.training.checkpoints import load_checkpoint
from top_jax.training.loop import train

__all__ = ["load_checkpoint", "train"]
