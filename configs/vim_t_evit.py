"""ViM-T pruned the ViT way, the baseline that ToP is compared with: best tokens first, re-indexed.

python train.py --config configs/vim_t_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 196 -> 167 -> 142, 1.29 of 1.45 GMACs (published convention): the same as vim_t_top, with the class token
moved to the middle of what is left; --config.pruning.fuse=True adds EViT's fused token. An SSM has no attention to
rank tokens by, so the ranking is ToP's.
Expected top-1: unknown (the paper's row could not be verified). Measured: not run.

Recipe: as vim_t_top.
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
        model=dict(name="vim_tiny", num_classes=1000, drop_path=0.0, dtype="bfloat16"),
        pruning=dict(method="evit", after_blocks=(10, 20), keep_ratio=(0.85,), score="clip", fuse=False),
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
