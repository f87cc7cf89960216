"""ViM-T pruned as a ViT would be, the baseline of ToP: best tokens first, positions re-indexed.

python train.py --config configs/vim_t_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 167 -> 142, 1.29 of 1.45 GMACs (published convention), as in vim_t_top.
Expected top-1: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.85 of the patch tokens each time, as vim_t_top does."""
    return recipes.finetune("vim_tiny", recipes.naive((10, 20), 0.85), drop_path=0.0)
