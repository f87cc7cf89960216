"""A segmenter over ViM-T on your own photographs and label maps, with token pruning.

python train.py --config configs/my_labels_top.py --config.data.data_dir=FOLDER --config.init_from=RUN

Tokens 1024 -> 871 -> 741. The schedule is ours.
Expected mIoU: depends on your data. Measured: not run on photographs.

Recipe: top_jax.recipes.my_labels.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """From the weights of my_labels, for half as long."""
    return recipes.my_labels(recipes.top((10, 20), 0.85), epochs=20.0, learning_rate=1e-4)
