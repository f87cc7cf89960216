"""UPerNet over ViM-S on ADE20K, pruned as a ViT would be: seg_vim_s with a pruned backbone.

python train.py --config configs/seg_vim_s_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 1024 -> 820 -> 656 -> 525; backbone 18.56 of 26.35 GMACs at 512 x 512 (published convention), neck and heads
125 more, never pruned.
Expected mIoU: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.vim_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.8 of the tokens after blocks 5, 10 and 15; the schedule is ours."""
    return recipes.vim_ade20k("small", recipes.naive((5, 10, 15), 0.8))
