"""PlainMamba-L3 pruned as a ViT would be, the baseline of ToP: best tokens first, on a condensed grid.

python train.py --config configs/plain_mamba_l3_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138 -> 97 -> 68, 8.43 of 14.41 GMACs (published convention), -41.5 %, as in plain_mamba_l3_top. The
schedule is inferred from the paper's -41.6 %.
Expected top-1: 79.3 % (second-hand from the paper, as the row without alignment). Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.7 of the tokens each time, as plain_mamba_l3_top does."""
    return recipes.finetune("plain_mamba_l3", recipes.naive((6, 12, 18), 0.7), drop_path=0.4, clip_norm=1.0)
