"""The dense twin of the quickstart: the same small ViM on scikit-learn's digits (1,797 real 8x8 images).

python train.py --config configs/vim_digits.py

Expected: at least 96 % test accuracy (ours; there is no published number). Measured: not run.
"""

from ml_collections import config_dict

from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Patch 2: 16 tokens in every block."""
    return make_config(
        batch_size=64,
        eval_batch_size=120,
        epochs=25.0,
        log_every=20,
        eval_every_epochs=5.0,
        checkpoint_every=100,
        model=dict(name="vim_tiny", num_classes=10, img_size=(8,), patch_size=2, embed_dim=64, depth=6, d_state=4),
        data=dict(
            source="digits",
            train_transform="random_resized_crop",
            min_area=0.6,
            eval_crop=1.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        augment=dict(flip=False),
        optimizer=dict(learning_rate=3e-3, warmup_epochs=2.0, weight_decay=0.05, clip_norm=1.0),
    )
