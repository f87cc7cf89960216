"""Training: a run from its config to its summary."""

from top_jax.training.loop import train
from top_jax.training.saved_weights import load_checkpoint

__all__ = ["load_checkpoint", "train"]
