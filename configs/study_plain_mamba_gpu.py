"""The study's PlainMamba (docs/study.md) for a GPU, dense: CIFAR-10, patches of 2 pixels, 256 tokens; width 128.

SMALL_STEPS=0 PRUNED=--after_blocks=3,6,9 bash docs/study.sh plain_mamba_gpu OUT --config.data.data_dir=DIR
python train.py --config configs/study_plain_mamba_gpu.py --config.data.data_dir=DIR

Expected: no published number (the recipe is ours). Measured: not run, because no GPU was available.

Recipe: top_jax.recipes.study_gpu.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Thirty epochs of all training images."""
    return recipes.study_gpu("plain_mamba_l1", num_convs_patch_embed=1, layers_with_dwconv=(0,))
