"""ViM-S pruned as a ViT would be, the baseline of ToP: best tokens first, positions re-indexed.

python train.py --config configs/vim_s_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 157 -> 126 -> 101, 3.59 of 5.07 GMACs (published convention), as in vim_s_top.
Expected top-1: 75.4 % (second-hand from the paper, as the row without alignment). Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.8 of the patch tokens each time, as vim_s_top does."""
    return recipes.finetune("vim_small", recipes.naive((5, 10, 15), 0.8), drop_path=0.05)
