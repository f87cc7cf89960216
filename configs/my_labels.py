"""A segmenter over ViM-T on your own photographs and label maps, dense.

python train.py --config configs/my_labels.py --config.data.data_dir=FOLDER --config.init_from=vim_t.pth

Expected mIoU: depends on your data. Measured: not run on photographs.

Recipe: top_jax.recipes.my_labels.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """40 epochs of 512 x 512 crops."""
    return recipes.my_labels()
