"""PlainMamba-L2 on ImageNet-1K, dense: the official recipe.

python train.py --config configs/plain_mamba_l2.py --config.data.data_dir=DIR

8.06 GMACs (published convention).
Expected top-1: 81.6 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """2048 images per step over all devices."""
    return recipes.plain_mamba_imagenet(
        "l2",
        batch_size=2048,
        drop_path=0.2,
        clip_norm=1.0,
        warmup_epochs=20.0,
        warmup_learning_rate=2e-6,
        min_learning_rate=2e-5,
        ema_decay=0.9999,
    )
