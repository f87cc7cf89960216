"""UPerNet over ViM-T on ADE20K, pruned as a ViT would be: seg_vim_t with a pruned backbone.

python train.py --config configs/seg_vim_t_evit.py --config.data.data_dir=DIR --config.init_from=RUN_OR_PTH

Tokens 1024 -> 871 -> 741; backbone 6.71 of 7.51 GMACs at 512 x 512 (published convention), neck and heads
31.5 more, never pruned.
Expected mIoU: unknown (the paper's row could not be verified). Measured: not run.

Recipe: top_jax.recipes.vim_ade20k.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.85 of the tokens after blocks 10 and 20; the schedule is ours."""
    return recipes.vim_ade20k("tiny", recipes.naive((10, 20), 0.85))
