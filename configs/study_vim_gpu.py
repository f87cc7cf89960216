"""The study's ViM (docs/study.md) for a GPU, dense: CIFAR-10, patches of 2 pixels, 256 tokens; 128 wide, 12 deep.

SMALL_STEPS=0 PRUNED=--after_blocks=3,6,9 bash docs/study.sh vim_gpu OUT --config.data.data_dir=DIR
python train.py --config configs/study_vim_gpu.py --config.data.data_dir=DIR

Expected: ours, there is no published number. Measured: not run, for no GPU was at hand.
"""

from ml_collections import config_dict

from top_jax import recipes
from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """Thirty epochs of all training images, with every augmentation, each milder than ImageNet's."""
    return make_config(
        batch_size=256,
        eval_batch_size=1000,
        epochs=30.0,
        eval_every_epochs=10.0,
        checkpoint_every=500,
        model=dict(
            name="vim_tiny",
            num_classes=10,
            img_size=(32,),
            patch_size=2,
            embed_dim=128,
            depth=12,
            drop_path=0.05,
            dtype="bfloat16",
        ),
        data=recipes.cifar10() | dict(num_workers=None),
        augment=recipes.small_images(),
        optimizer=dict(learning_rate=1e-3, warmup_epochs=2.0, weight_decay=0.05, clip_norm=1.0),
    )
