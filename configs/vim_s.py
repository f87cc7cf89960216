"""ViM-S on ImageNet-1K, dense: the official pre-training recipe.

python train.py --config configs/vim_s.py --config.data.data_dir=DIR

5.07 GMACs (published convention).
Expected top-1: 80.5 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.vim_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """512 images per step over all devices."""
    return recipes.vim_imagenet("small", batch_size=512, learning_rate=1e-3, drop_path=0.05, weight_decay=0.05)
