"""The study's ViM (docs/study.md) for a GPU, dense: CIFAR-10, patches of 2 pixels, 256 tokens; width 128, depth 12.

SMALL_STEPS=0 PRUNED=--after_blocks=3,6,9 bash docs/study.sh vim_gpu OUT --config.data.data_dir=DIR
python train.py --config configs/study_vim_gpu.py --config.data.data_dir=DIR

Expected: no published number (the recipe is ours). Measured: not run, because no GPU was available.

Recipe: top_jax.recipes.study_gpu.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Thirty epochs of all training images."""
    return recipes.study_gpu("vim_tiny")
