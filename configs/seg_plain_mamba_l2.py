"""UPerNet over PlainMamba-L2 on ADE20K, dense: the official segmentation recipe, from ImageNet weights.

python train.py --config configs/seg_plain_mamba_l2.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Backbone 42.11 GMACs at 512 x 512 (published convention); neck and heads 29.1 more.
Expected mIoU: 46.8 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """16 images per step over all devices."""
    return recipes.plain_mamba_ade20k("l2")
