"""ViM-S with token pruning: dense weights, fine-tuned for 30 epochs while tokens are dropped after blocks 5, 10 and 15.

python train.py --config configs/vim_s_top.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 157 -> 126 -> 101, 3.59 of 5.07 GMACs (published convention): the schedule is inferred from the
paper's 3.6 G.
Expected top-1: 78.8 % with alignment, 75.4 % without (second-hand from the paper). Measured: not run.

Recipe: ToP, 8 x 64 images, 30 epochs, weight decay 1e-8, and the augmentation of ViM's main.py, each image three times
in a row; top_jax.recipes says what differs. The authors' script asks for a learning rate of 5e-6 with a minimum of
1e-5, so that it would rise; ours falls from 1e-5 to 1e-6. Averaged weights, main.py's default, are not kept.
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
        model=dict(name="vim_small", num_classes=1000, drop_path=0.05, dtype="bfloat16"),
        pruning=dict(after_blocks=(5, 10, 15), keep_ratio=(0.8,)),
        data=dict(source="tfds", name="imagenet2012", eval_split="validation", num_workers=None),
        augment=recipes.deit(),
        optimizer=dict(
            learning_rate=1e-5,
            warmup_learning_rate=1e-6,
            min_learning_rate=1e-6,
            warmup_epochs=5.0,
            weight_decay=1e-8,
            label_smoothing=0.1,
        ),
    )
