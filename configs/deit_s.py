"""DeiT-S on ImageNet-1K, dense: the official recipe, without distillation.

python train.py --config configs/deit_s.py --config.data.data_dir=DIR

4.60 GMACs (published convention).
Expected top-1: 79.8 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.deit_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """1024 images per step over all devices."""
    return recipes.deit_imagenet("small")
