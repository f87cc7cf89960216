"""AdamW, with learning-rate schedule, weight-decay mask, layer-wise learning rates and a frozen backbone."""

from __future__ import annotations

from typing import Any, Final

import jax
import optax

from top_jax.config import OptimizerConfig

STEM: Final = ("patch_embed", "pos_embed", "cls_token")
HEADS: Final = ("head", "neck", "decode_head", "auxiliary_head")  # a classifier has the first; a segmenter the others
# In addition to every array of one dimension (biases, norms, D). The official recipe's timm 0.4.12 does decay A_log;
# Mamba marks it as not decayed, and we follow Mamba.
NOT_DECAYED: Final = ("A_log", "direction_Bs", "pos_embed", "cls_token")


def learning_rate_schedule(
    config: OptimizerConfig, *, batch_size: int, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns a linear warm-up, then a decay to `min_learning_rate` at the last step: half a cosine, or linear.

    The warm-up takes at most half of the run, so that even a run of a few steps has both parts. With `schedule=poly` it
    is a factor of the linear decay, which starts at step 0.

    Source of poly: mmcv 1.7.1, PolyLrUpdaterHook with power 1 and a linear warm-up.
    """
    scale = 1.0 if config.reference_batch_size is None else batch_size / config.reference_batch_size
    wanted = round(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    warmup_steps = min(wanted, total_steps // 2)
    if config.schedule == "poly":
        return _poly(config, peak=config.learning_rate * scale, warmup_steps=warmup_steps, total_steps=total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.warmup_learning_rate if warmup_steps else config.learning_rate * scale,
        peak_value=config.learning_rate * scale,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=config.min_learning_rate,
    )


def _poly(config: OptimizerConfig, *, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    end, start = config.min_learning_rate, config.warmup_learning_rate / peak if peak else 1.0

    def rate(step: Any) -> Any:
        # optax.linear_schedule subtracts nearly equal numbers: in float32 the first rate would be off by a hundredth.
        line = end + (peak - end) * (total_steps - step) / total_steps
        share = jax.numpy.minimum(step, warmup_steps) / max(1, warmup_steps)
        return line * (start + (1 - start) * share) if warmup_steps else line

    return rate


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW, after clipping by the global norm if `clip_norm` is set.

    With `layer_decay` each step is multiplied by the parameter's `depth_scales`, and so is its weight decay. With
    `freeze_backbone` only the head has updates, weight decay and optimizer state.
    """
    adamw: optax.GradientTransformation = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask
    )
    steps: list[optax.GradientTransformation] = [adamw]
    if config.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay is not None and not config.freeze_backbone:  # the head's factor is 1
        steps.append(_scaled_by_depth(config.layer_decay, config.layer_decay_rule))
    optimizer = steps[0] if len(steps) == 1 else optax.chain(*steps)
    if not config.freeze_backbone:
        return optimizer
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, _trained_or_frozen)


def freeze(params: Any) -> Any:
    """Returns the parameters, with gradients only for the heads; XLA then drops the rest of the backward pass."""
    return {name: part if name in HEADS else jax.lax.stop_gradient(part) for name, part in params.items()}


def depth_scales(params: Any, layer_decay: float, rule: str = "blocks") -> Any:
    """Returns the learning-rate factor of each parameter: `layer_decay` to the power of its distance from the head.

    Heads, a segmenter's neck and final norms have distance 0, the last block 1, the first block `depth`; patch
    embedding, position embedding and class token have `depth + 1`.

    Source: microsoft/unilm, beit/optim_factory.py, and timm's `param_groups_layer_decay`. With the rule `official` the
    blocks have distance 0 too: hustvl/Vim, seg/mmcv_custom/layer_decay_optimizer_constructor.py looks for
    `backbone.blocks`, and ViM's are called `backbone.layers`.
    """
    prefix = ("backbone",) if "backbone" in params else ()
    depth = len((params["backbone"] if prefix else params)["blocks"])

    def scale(path: tuple[Any, ...], _: Any) -> float:
        keys: list[Any] = [part.key for part in path]
        if tuple(keys[: len(prefix)]) != prefix:
            return 1.0
        part, *rest = keys[len(prefix) :]
        if part == "blocks" and rule == "blocks":
            return layer_decay ** (depth - int(rest[0]))
        return layer_decay ** (depth + 1) if part in STEM else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def _scaled_by_depth(layer_decay: float, rule: str) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda update, by: update * by, updates, depth_scales(updates, layer_decay, rule))

    return optax.stateless(scale)


def _trained_or_frozen(params: Any) -> Any:
    return {name: "trained" if name in HEADS else "frozen" for name in params}


def decay_mask(params: Any) -> Any:
    """Returns True for the parameters that decay: the kernels of linear layers and convolutions.

    Not A_log, D, PlainMamba's direction_Bs, biases, norms, the position embedding and the class token.
    """

    def decays(path: tuple[Any, ...], param: Any) -> bool:
        return param.ndim > 1 and path[-1].key not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
