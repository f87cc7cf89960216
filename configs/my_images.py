"""Your own photographs: an image folder, from weights of ImageNet (or of any run) to a model of your classes.

python train.py --config configs/my_images.py --config.data.data_dir=PHOTOS --config.init_from=vim_s.pth

PHOTOS holds one folder per class, or train/ and val/ with one folder per class each. The classes, the splits and the
batch sizes come from it. docs/guides/own_images.md has small settings for a CPU.
Expected: depends on the photographs (no published number; the recipe is ours). Measured: not run at this size.

Recipe: top_jax.recipes.my_images.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """The dense ViM-S, with a new head."""
    return recipes.my_images()
