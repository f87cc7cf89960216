"""The study's PlainMamba (docs/study.md), dense: CIFAR-10 with patches of 2 pixels, 256 tokens; width 48, depth 6, N 4.

bash docs/study.sh plain_mamba runs/study_plain_mamba --config.data.data_dir=DIR
python train.py --config configs/study_plain_mamba.py --config.data.data_dir=DIR --config.init_from=FILE.safetensors

The first command is the study. It runs the second for each of three seeds, from weights trained on images of 16 pixels.
Expected: ours, there is no published number. Measured: docs/study.md.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Small enough for a CPU; crops and flips only, because the runs are short."""
    return make_config(
        batch_size=64,
        eval_batch_size=250,
        total_steps=200,
        log_every=20,
        eval_every_epochs=1000.0,
        checkpoint_every=100,
        model=dict(
            name="plain_mamba_l1",
            num_classes=10,
            img_size=(32,),
            patch_size=2,
            embed_dim=48,
            depth=6,
            d_state=4,
            num_convs_patch_embed=0,
            layers_with_dwconv=(0,),
        ),
        data=recipes.cifar10(),
        optimizer=dict(learning_rate=1e-3, warmup_epochs=0.02, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.0),
    )
