"""ViM-T on ImageNet-1K, dense: the official pre-training recipe.

python train.py --config configs/vim_t.py --config.data.data_dir=DIR

1.45 GMACs (published convention).
Expected top-1: 76.1 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.vim_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """1024 images per step over all devices."""
    return recipes.vim_imagenet("tiny", batch_size=1024, learning_rate=5e-4, drop_path=0.0, weight_decay=0.1)
