"""A small dense segmenter trained from scratch on scikit-learn's digits, pasted on its two photographs.

python train.py --config configs/seg_digits.py

Backbone 39.1 MMACs (published convention).
Expected mIoU: none is published. Measured: 86.8, 87.8, 83.6 % (seeds 0, 1, 2; d1038fa, 2026-11-28, a CPU).

Recipe: top_jax.recipes.seg_digits.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Patch 8: 64 tokens of a scene of 64 x 64 pixels."""
    return recipes.seg_digits()
