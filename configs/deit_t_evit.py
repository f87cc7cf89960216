"""EViT on DeiT-T: tokens that the class token does not attend to are fused inside blocks 4, 7 and 10.

python train.py --config configs/deit_t_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 138+1 -> 98+1 -> 70+1, 0.82 of 1.25 GMACs (published convention).
Expected top-1: unknown. Measured: not run.

Recipe: youweiliang/evit, finetune.sh (8 x 256 images, 30 epochs from the dense model), with the augmentation of its
main.py, each image three times in a row; top_jax.recipes says what differs. Averaged weights, main.py's default, are
not kept.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Without init_from the run says so and starts from random weights."""
    return make_config(
        batch_size=2048,
        epochs=30.0,
        eval_every_epochs=1.0,
        checkpoint_every=500,
        model=dict(name="deit_tiny", num_classes=1000, drop_path=0.1, dtype="bfloat16"),
        pruning=dict(method="evit", after_blocks=(4, 7, 10), keep_ratio=(0.7,)),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.deit(),
        optimizer=dict(
            learning_rate=2e-5,
            reference_batch_size=512,
            warmup_learning_rate=1e-6,
            min_learning_rate=2e-6,
            warmup_epochs=0.0,
            weight_decay=1e-6,
            label_smoothing=0.1,
        ),
    )
