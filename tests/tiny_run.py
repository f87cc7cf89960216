"""The run of the tests: seconds on a CPU, and everything a resume could get wrong is switched on."""

from ml_collections import config_dict

from top_jax.config import make_config


def get_config() -> config_dict.ConfigDict:
    """30 steps on the digits; 5 -> 3 tokens."""
    return make_config(
        batch_size=16,
        eval_batch_size=100,
        total_steps=30,
        log_every=1,
        checkpoint_every=4,
        eval_every_epochs=0.11,  # 10 steps
        model=dict(
            name="vim_tiny",
            num_classes=10,
            img_size=(8,),
            patch_size=4,
            embed_dim=16,
            depth=2,
            d_state=4,
            drop_path=0.3,
        ),
        pruning=dict(after_blocks=(1,), keep_ratio=(0.5,)),
        data=dict(source="digits", train_transform="shift_crop", shift=1, eval_crop=1.0),
        augment=dict(flip=False),
        optimizer=dict(learning_rate=5e-3, ema_decay=0.9, accumulate=2, clip_norm=1.0),
    )
