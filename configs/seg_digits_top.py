"""The segmentation quickstart: seg_digits with token pruning, trained from scratch.

python train.py --config configs/seg_digits_top.py

Tokens 64 -> 45 -> 32; backbone 32.4 of 39.1 MMACs (published convention).
Expected mIoU: at least 0.95 of seg_digits at the same seed (ours; none is published). Measured: 84.3, 85.0, 84.9 %, or
0.97, 0.97, 1.02 of the dense ones (seeds 0, 1, 2; d1038fa, 2026-11-28, a CPU).

Recipe: top_jax.recipes.seg_digits.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Patch 8: 64 tokens, 45 after block 2 and 32 after block 4."""
    return recipes.seg_digits(recipes.top((2, 4), 0.7))
