"""A small ViM on CIFAR-10, pruned: width 96, depth 12, patch 4 (64 tokens; --config.model.patch_size=2 gives 256).

python train.py --config configs/vim_cifar10_top.py --config.data.data_dir=DIR --config.init_from=runs/vim_cifar10

Tokens 64 -> 45 -> 32 -> 23.
Expected: no published number (the recipe is ours). Measured: not run to the end.

Recipe: top_jax.recipes.vim_cifar10.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """20 epochs of fine-tuning; keeps 0.7 of the patch tokens after blocks 3, 6 and 9."""
    return recipes.vim_cifar10(
        epochs=20.0, learning_rate=2e-4, warmup_epochs=1.0, drop_path=0.0, pruning=recipes.top((3, 6, 9), 0.7)
    )
