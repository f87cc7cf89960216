"""AdamW with its learning-rate schedule and its weight-decay mask."""

from __future__ import annotations

from typing import Any, Final

import jax
import optax

from top_jax.config import OptimizerConfig

# In addition to every array of one dimension (biases, norms, D). The official recipe's timm 0.4.12 does decay A_log;
# Mamba marks it as not decayed, and we follow Mamba.
NOT_DECAYED: Final = ("A_log", "direction_Bs", "pos_embed", "cls_token")


def learning_rate_schedule(
    config: OptimizerConfig, *, batch_size: int, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns a linear warm-up, then half a cosine down to `min_learning_rate` at the last step.

    The warm-up takes at most half of the run, so that even a run of a few steps has both parts.
    """
    scale = 1.0 if config.reference_batch_size is None else batch_size / config.reference_batch_size
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), total_steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.warmup_learning_rate if warmup_steps else config.learning_rate * scale,
        peak_value=config.learning_rate * scale,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=config.min_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW, after clipping by the global norm if `clip_norm` is set."""
    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params: Any) -> Any:
    """Returns True for the parameters that decay: the kernels of linear layers and convolutions.

    Not A_log, D, PlainMamba's direction_Bs, biases, norms, the position embedding and the class token.
    """

    def decays(path: tuple[Any, ...], param: Any) -> bool:
        return param.ndim > 1 and path[-1].key not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
