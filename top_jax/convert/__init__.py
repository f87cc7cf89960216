"""Official PyTorch checkpoints to our models, and back.

.pth or .safetensors <-> files: state_dict <-> keys (official name <-> our path) <-> load, save <-> model
"""

from top_jax.convert.load import load_state_dict, load_torch_checkpoint
from top_jax.convert.save import save_torch_checkpoint, state_dict_of

__all__ = ["load_state_dict", "load_torch_checkpoint", "save_torch_checkpoint", "state_dict_of"]
