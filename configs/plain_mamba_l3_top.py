"""PlainMamba-L3 with token pruning: dense weights, fine-tuned with pruning after blocks 6, 12 and 18.

python train.py --config configs/plain_mamba_l3_top.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138 -> 97 -> 68, 8.43 of 14.41 GMACs (published convention), -41.5 %. The schedule is inferred from
the paper's -41.6 %.
Expected top-1: 81.7 % (published in the paper's abstract). Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.7 of the tokens each time."""
    return recipes.finetune("plain_mamba_l3", recipes.top((6, 12, 18), 0.7), drop_path=0.4, clip_norm=1.0)
