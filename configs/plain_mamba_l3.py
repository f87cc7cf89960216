"""PlainMamba-L3 on ImageNet-1K, dense: the official recipe.

python train.py --config configs/plain_mamba_l3.py --config.data.data_dir=DIR

14.41 GMACs (published convention).
Expected top-1: 82.3 % (published by the authors). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_imagenet.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """1024 images per step over all devices."""
    return recipes.plain_mamba_imagenet(
        "l3",
        batch_size=1024,
        drop_path=0.4,
        clip_norm=1.0,
        warmup_epochs=20.0,
        warmup_learning_rate=1e-6,
        min_learning_rate=1e-5,
        ema_decay=0.9999,
    )
