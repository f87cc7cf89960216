"""DeiT-S on ImageNet-1K, dense: the official recipe (facebookresearch/deit; no distillation).

python train.py --config configs/deit_s.py --config.data.data_dir=DIR

4.60 GMACs (published convention).
Expected top-1: 79.8 % (published by the authors). Measured: not run.
Augmentation as by the defaults of the authors' main.py, each image three times in a row; top_jax.recipes says what
differs. Matrix products run in bfloat16 (the authors train under float16 autocast).
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """1024 images a step over all devices; the authors' learning rate is per 512 images."""
    return make_config(
        batch_size=1024,
        epochs=300.0,
        eval_every_epochs=5.0,
        checkpoint_every=2500,
        model=dict(name="deit_small", num_classes=1000, drop_path=0.1, dtype="bfloat16"),
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
