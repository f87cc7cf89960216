"""Training, from a config to a summary. `train` is imported at its first use, because it needs the extra `train`."""

from typing import TYPE_CHECKING, Any

from top_jax.training.weights import load_checkpoint

if TYPE_CHECKING:
    from top_jax.training.loop import train

__all__ = ["load_checkpoint", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from top_jax.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
