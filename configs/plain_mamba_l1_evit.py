"""PlainMamba-L1 pruned as a ViT would be, the baseline of ToP: best tokens first, on a condensed grid.

python train.py --config configs/plain_mamba_l1_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138 -> 97 -> 68, 2.07 of 3.01 GMACs (published convention), -31 %, as in plain_mamba_l1_top. The paper
gives no schedule for this size; this one is ours.
Expected top-1: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.7 of the tokens each time, as plain_mamba_l1_top does."""
    return recipes.finetune("plain_mamba_l1", recipes.naive((5, 10, 15), 0.7), drop_path=0.2, clip_norm=5.0)
