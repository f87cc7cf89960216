"""PlainMamba-L3 on ImageNet-1K, dense: the official recipe (ChenhongyiYang/PlainMamba, plain_mamba_l3_in1k_300e.py).

python train.py --config configs/plain_mamba_l3.py --config.data.data_dir=DIR

14.41 GMACs (published convention).
Expected top-1: 82.3 % (published by the authors). Measured: not run.
Augmentation as in the authors' config; top_jax.recipes says what differs. Matrix products run in bfloat16 (the
authors' config asks for no mixed precision). Their moving average should change its pace at epoch 250 (decay_factor 10;
the public hook has no value from there on); ours keeps it.
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
        model=dict(name="plain_mamba_l3", num_classes=1000, drop_path=0.4, dtype="bfloat16"),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.plain_mamba(),
        optimizer=dict(
            learning_rate=5e-4,
            reference_batch_size=512,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-5,
            warmup_epochs=20.0,
            weight_decay=0.05,
            clip_norm=1.0,
            label_smoothing=0.1,
            ema_decay=0.9999,
        ),
    )
