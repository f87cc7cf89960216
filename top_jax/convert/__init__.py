"""Converts official PyTorch checkpoints to our models and back, and exports models as StableHLO.

.pth or .safetensors file <-> state_dict (checkpoint_files) <-> official key to our path (key_maps) <-> model
(torch_checkpoint, segmenter_checkpoint).
"""

from top_jax.convert.segmenter_checkpoint import load_torch_segmenter, save_torch_segmenter
from top_jax.convert.torch_checkpoint import (
    load_state_dict,
    load_torch_checkpoint,
    save_torch_checkpoint,
    state_dict_of,
)

__all__ = [
    "load_state_dict",
    "load_torch_checkpoint",
    "load_torch_segmenter",
    "save_torch_checkpoint",
    "save_torch_segmenter",
    "state_dict_of",
]
