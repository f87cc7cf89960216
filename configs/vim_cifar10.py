"""A small ViM on CIFAR-10, dense: width 96, depth 12, patch 4 (64 tokens; --config.model.patch_size=2 gives 256).

python train.py --config configs/vim_cifar10.py --config.data.data_dir=DIR

Expected: no published number (the recipe is ours). Measured: not run to the end.

Recipe: top_jax.recipes.vim_cifar10.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """100 epochs from scratch."""
    return recipes.vim_cifar10(epochs=100.0, learning_rate=1e-3, warmup_epochs=5.0, drop_path=0.05)
