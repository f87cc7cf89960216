"""Official PyTorch checkpoints to our models.

.pth file -> torch_file.read_state_dict -> keys (official name <-> our path) -> strict load -> model
"""

from top_jax.convert.load import load_state_dict, load_torch_checkpoint

__all__ = ["load_state_dict", "load_torch_checkpoint"]
