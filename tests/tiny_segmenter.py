"""A segmentation run of seconds: digit scenes, a pruned ViM, slide inference of 2 x 2 windows, everything saved."""

from ml_collections import config_dict

from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """6 steps; 16 -> 8 tokens."""
    return make_config(
        batch_size=8,
        eval_batch_size=60,
        total_steps=6,
        log_every=1,
        checkpoint_every=2,
        eval_every_epochs=0.0167,  # 3 steps
        model=dict(
            name="vim_tiny",
            head="uper",
            num_classes=11,
            img_size=(32,),
            patch_size=8,
            embed_dim=16,
            depth=4,
            d_state=4,
            drop_path=0.3,
            channels=8,
            aux_channels=8,
        ),
        pruning=dict(after_blocks=(1,), keep_ratio=(0.5,)),
        data=dict(source="digit_scenes", scale=(48, 48), scale_range=(0.8, 1.5), max_class_share=1.0),
        augment=dict(photometric=True),
        optimizer=dict(
            learning_rate=5e-3,
            schedule="poly",
            min_learning_rate=0.0,
            warmup_steps=2,
            label_smoothing=0.0,
            ema_decay=0.9,
            accumulate=2,
            layer_decay=0.9,
        ),
    )
