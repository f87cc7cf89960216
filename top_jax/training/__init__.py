"""Training, from a config to a summary."""

from top_jax.training.loop import train
from top_jax.training.weights import load_checkpoint

__all__ = ["load_checkpoint", "train"]
