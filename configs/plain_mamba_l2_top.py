"""PlainMamba-L2 with token pruning: dense weights, fine-tuned for 30 epochs while tokens are dropped in three places.

python train.py --config configs/plain_mamba_l2_top.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138 -> 97 -> 68, 5.30 of 8.06 GMACs (published convention), -34 %: the paper gives no schedule for
this size, this one is ours.
Expected top-1: unknown (the paper's row could not be verified). Measured: not run.

Recipe: ToP's for ViM (8 x 64 images, 30 epochs, weight decay 1e-8; see vim_s_top for its learning rate), with this
model's clipping and augmentation (top_jax.recipes); the paper says nothing of PlainMamba's.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Without init_from the run says so and starts from random weights."""
    return make_config(
        batch_size=512,
        epochs=30.0,
        eval_every_epochs=1.0,
        checkpoint_every=1000,
        model=dict(name="plain_mamba_l2", num_classes=1000, drop_path=0.2, dtype="bfloat16"),
        pruning=dict(after_blocks=(5, 10, 15), keep_ratio=(0.7,)),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.plain_mamba(),
        optimizer=dict(
            learning_rate=1e-5,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-6,
            warmup_epochs=5.0,
            weight_decay=1e-8,
            clip_norm=1.0,
            label_smoothing=0.1,
        ),
    )
