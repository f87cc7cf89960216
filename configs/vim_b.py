"""ViM-B on ImageNet-1K, dense: the official pre-training recipe (hustvl/Vim, whose script is not public).

python train.py --config configs/vim_b.py --config.data.data_dir=DIR

18.85 GMACs (published convention).
Expected top-1: 81.9 % (averaged weights) (published by the authors). Measured: not run.
Augmentation as by the defaults of the authors' main.py, each image three times in a row; top_jax.recipes says what
differs. Other than there, A_log is not decayed, and matrix products run in bfloat16 (the authors train in float32).
The authors publish no script for this size: batch, rate and drop-path are ours.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """512 images a step over all devices; the authors' learning rate is per 512 images."""
    return make_config(
        batch_size=512,
        epochs=300.0,
        eval_every_epochs=5.0,
        checkpoint_every=2500,
        model=dict(name="vim_base", num_classes=1000, drop_path=0.4, dtype="bfloat16"),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.deit(),
        optimizer=dict(
            learning_rate=5e-4,
            reference_batch_size=512,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-5,
            warmup_epochs=5.0,
            weight_decay=0.05,
            label_smoothing=0.1,
            ema_decay=0.99996,
        ),
    )
