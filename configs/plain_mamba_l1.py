"""PlainMamba-L1 on ImageNet-1K, dense: the official recipe.

python train.py --config configs/plain_mamba_l1.py --config.data.data_dir=DIR

3.01 GMACs (published convention).
Expected top-1: 77.9 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """2048 images per step over all devices."""
    return recipes.plain_mamba_imagenet(
        "l1",
        batch_size=2048,
        drop_path=0.2,
        clip_norm=5.0,
        warmup_epochs=15.0,
        warmup_learning_rate=2e-6,
        min_learning_rate=2e-5,
    )
