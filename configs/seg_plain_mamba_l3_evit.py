"""UPerNet over PlainMamba-L3 on ADE20K, pruned as a ViT would be: seg_plain_mamba_l3 with a pruned backbone.

python train.py --config configs/seg_plain_mamba_l3_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 1024 -> 717 -> 502 -> 352; backbone 43.81 of 75.27 GMACs at 512 x 512 (published convention), neck and heads
29.5 more, never pruned.
Expected mIoU: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.plain_mamba_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.7 of the tokens after blocks 6, 12 and 18; the schedule is ours."""
    return recipes.plain_mamba_ade20k("l3", recipes.naive((6, 12, 18), 0.7))
