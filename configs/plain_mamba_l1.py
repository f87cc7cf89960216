"""PlainMamba-L1 on ImageNet-1K, dense: the official recipe (ChenhongyiYang/PlainMamba, plain_mamba_l1_in1k_300e.py).

python train.py --config configs/plain_mamba_l1.py --config.data.data_dir=DIR

3.01 GMACs (published convention).
Expected top-1: 77.9 % (published by the authors). Measured: not run.
Augmentation as in the authors' config; top_jax.recipes says what differs. Matrix products run in bfloat16 (the
authors train under float16 autocast).
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """2048 images a step over all devices; the authors' learning rate is per 512 images."""
    return make_config(
        batch_size=2048,
        epochs=300.0,
        eval_every_epochs=5.0,
        checkpoint_every=2500,
        model=dict(name="plain_mamba_l1", num_classes=1000, drop_path=0.2, dtype="bfloat16"),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.plain_mamba(),
        optimizer=dict(
            learning_rate=5e-4,
            reference_batch_size=512,
            warmup_learning_rate=2e-6,
            min_learning_rate=2e-5,
            warmup_epochs=15.0,
            weight_decay=0.05,
            clip_norm=5.0,
            label_smoothing=0.1,
        ),
    )
