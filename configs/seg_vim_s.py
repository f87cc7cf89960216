"""UPerNet over ViM-S on ADE20K, dense: the official segmentation recipe, from ImageNet weights.

python train.py --config configs/seg_vim_s.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Backbone 26.35 GMACs at 512 x 512 (published convention); neck and heads 125 more.
Expected mIoU: 44.9 % (published by the authors, from memory; their variant). Measured: not run.

Recipe: top_jax.recipes.vim_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """32 images per step over all devices."""
    return recipes.vim_ade20k("small")
