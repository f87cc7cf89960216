"""A small ViM on CIFAR-10, pruned: width 96, depth 12, patch 4 (64 tokens; --config.model.patch_size=2 gives 256).

python train.py --config configs/vim_cifar10_top.py --config.data.data_dir=DIR --config.init_from=runs/vim_cifar10

Augmentation: ours, all of it on but mild (top_jax.recipes.small_images).
Expected: ours, there is no published number. Measured: not run to the end.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Keep 0.7 after blocks 3, 6 and 9: 64 -> 45 -> 32 -> 23 tokens."""
    return make_config(
        batch_size=128,
        eval_batch_size=200,
        epochs=20.0,
        eval_every_epochs=2.0,
        checkpoint_every=500,
        model=dict(
            name="vim_tiny", num_classes=10, img_size=(32,), patch_size=4, embed_dim=96, depth=12, drop_path=0.0
        ),
        pruning=dict(after_blocks=(3, 6, 9), keep_ratio=(0.7,)),
        data=recipes.cifar10(),
        augment=recipes.small_images(),
        optimizer=dict(learning_rate=2e-4, warmup_epochs=1.0, weight_decay=0.05, clip_norm=1.0),
    )
