"""The study's ViM (docs/study.md), dense: CIFAR-10 with patches of 2 pixels, 256 tokens; width 48, depth 6, 4 states.

bash docs/study.sh vim runs/study_vim --config.data.data_dir=DIR
python train.py --config configs/study_vim.py --config.data.data_dir=DIR --config.init_from=FILE.safetensors

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
        model=dict(name="vim_tiny", num_classes=10, img_size=(32,), patch_size=2, embed_dim=48, depth=6, d_state=4),
        data=recipes.cifar10(),
        optimizer=dict(learning_rate=1e-3, warmup_epochs=0.02, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.0),
    )
