"""UPerNet over PlainMamba-L1 on ADE20K, pruned as a ViT would be: seg_plain_mamba_l1 with a pruned backbone.

python train.py --config configs/seg_plain_mamba_l1_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 1024 -> 717 -> 502 -> 352; backbone 10.78 of 15.70 GMACs at 512 x 512 (published convention), neck and heads
27.9 more, never pruned.
Expected mIoU: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.7 of the tokens after blocks 5, 10 and 15; the schedule is ours."""
    return recipes.plain_mamba_ade20k("l1", recipes.naive((5, 10, 15), 0.7))
