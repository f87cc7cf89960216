"""Your own photographs with token pruning: like configs/my_images.py, pruned after blocks 5, 10 and 15.

python train.py --config configs/my_images_top.py --config.data.data_dir=PHOTOS --config.init_from=runs/my_images_PHOTOS

Starts from the run of configs/my_images.py on the same folder, whose classifier it keeps; or, with
--config.init_head=new, from any file.
Tokens 196 -> 157 -> 126 -> 101, 3.59 of 5.07 GMACs (published convention).
Expected: depends on the photographs (no published number; the recipe is ours). Measured: not run at this size.

Recipe: top_jax.recipes.my_images.
"""

from ml_collections import config_dict

from top_jax import recipes


def get_config() -> config_dict.ConfigDict:
    """Keeps 0.8 of the patch tokens each time; a tenth of the dense model's rate, for a third of its epochs."""
    return recipes.my_images(recipes.top((5, 10, 15), 0.8), init_head="load", epochs=10.0, learning_rate=5e-5)
