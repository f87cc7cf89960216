"""A small dense segmenter trained from scratch on scikit-learn's digits, pasted on its two photographs.

python train.py --config configs/seg_digits.py

Backbone 15.1 MMACs (published convention).
Expected mIoU: none is published. Measured: no whole run; at half of it 8.3 %,
background only; docs/guides/segmentation.md.

Recipe: top_jax.recipes.seg_digits.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Patch 8: 64 tokens of a 64 x 64 scene."""
    return recipes.seg_digits()
