"""ViM-B on ImageNet-1K, dense: the official pre-training recipe.

python train.py --config configs/vim_b.py --config.data.data_dir=DIR

18.85 GMACs (published convention).
Expected top-1: 81.9 % with averaged weights (published by the authors). Measured: not run.
The authors publish no script for this size: batch size, learning rate and drop-path are ours.

Recipe: top_jax.recipes.vim_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """512 images per step over all devices."""
    return recipes.vim_imagenet("base", batch_size=512, learning_rate=5e-4, drop_path=0.4, weight_decay=0.05)
