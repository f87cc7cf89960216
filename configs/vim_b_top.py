"""ViM-B with token pruning: dense weights, fine-tuned for 30 epochs with pruning after blocks 5, 10 and 15.

python train.py --config configs/vim_b_top.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 157 -> 126 -> 101, 13.30 of 18.85 GMACs (published convention). The paper has no such row; the schedule
is ViM-S's.
Expected top-1: unknown. Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.8 of the patch tokens each time."""
    return recipes.finetune("vim_base", recipes.top((5, 10, 15), 0.8), drop_path=0.4)
