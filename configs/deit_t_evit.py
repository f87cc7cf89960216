"""EViT on DeiT-T: blocks 4, 7 and 10 fuse the tokens that the class token attends to least.

python train.py --config configs/deit_t_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138+1 -> 98+1 -> 70+1, 0.82 of 1.25 GMACs (published convention).
Expected top-1: unknown. Measured: not run.

Recipe: top_jax.recipes.evit_finetune.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """2048 images per step over all devices."""
    return recipes.evit_finetune("tiny")
