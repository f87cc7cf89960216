"""The study's PlainMamba (docs/study.md), dense: CIFAR-10 with patches of 2 pixels, 256 tokens; width 48, depth 6, N 4.

bash docs/study.sh plain_mamba runs/study_plain_mamba --config.data.data_dir=DIR
python train.py --config configs/study_plain_mamba.py --config.data.data_dir=DIR --config.init_from=FILE.safetensors

The first command is the study. It runs the second for each of three seeds, from weights trained on images of 16 pixels.
Expected: no published number (the recipe is ours). Measured: docs/study.md.

Recipe: top_jax.recipes.study.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Small enough for a CPU."""
    return recipes.study("plain_mamba_l1", num_convs_patch_embed=0, layers_with_dwconv=(0,))
