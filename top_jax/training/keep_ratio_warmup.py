"""Warm-up of the keep ratio: a run starts dense and reaches its pruning in a few stages, each one compiled program.

EViT lowers the ratio from 1 with every step, along half a cosine (arXiv 2202.07800; youweiliang/evit, helpers.py,
`adjust_keep_rate`). Here token counts are static and each ratio needs its own program, so we take a few equal steps.
"""

from __future__ import annotations

import dataclasses

from top_jax.config import PruningConfig
from top_jax.errors import InputError
from top_jax.pruning import Reduction


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run in which the model's token counts stay the same.

    Attributes:
        first_step: number of steps before the stage.
        reduction: how the model drops tokens during the stage.
    """

    first_step: int
    reduction: Reduction


def stages(
    target: Reduction, config: PruningConfig, *, num_patches: int, depth: int, steps_per_epoch: float, total_steps: int
) -> tuple[Stage, ...]:
    """Returns the stages of a run; they depend only on its settings, so a resumed run continues in the right stage.

    The warm-up takes W = round(warmup_epochs x steps_per_epoch) steps. Its stage i of S = warmup_stages, i from 0,
    starts at step ceil(i W / S) and keeps 1 - (1 - r) i / S where the target keeps r: the first is the dense model. At
    step W the target follows. A stage that has the same token counts as the one before it is left out, and
    so is one without steps.

    Args:
        target: the run's reduction.
        config: with `warmup_epochs` and `warmup_stages`; without a warm-up there is one stage.
        num_patches: M, patch tokens of an image.
        depth: number of blocks.
        steps_per_epoch: batches in an epoch.
        total_steps: length of the run.

    Returns:
        At least one stage, by first_step from 0; the last has the target.

    Raises:
        InputError: a warm-up without pruning, one that takes the whole run, or token counts that the method cannot
            reach in some stage.
    """
    cuts = target.schedule(num_patches, depth)
    if not config.warmup_epochs:
        return (Stage(0, target),)
    if not target.after_blocks:
        raise InputError(
            f"pruning.warmup_epochs={config.warmup_epochs} needs a pruned model, and this one is dense; set "
            "pruning.after_blocks, or warmup_epochs=0."
        )
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise InputError(
            f"pruning.warmup_epochs={config.warmup_epochs} is {warmup_steps} of the run's {total_steps} steps, so no "
            "step would train at the final keep ratio; use fewer epochs, or train longer."
        )
    found = [(Stage(warmup_steps, target), cuts)]
    for i in reversed(range(config.warmup_stages)):
        ratios = tuple(1 - (1 - ratio) * i / config.warmup_stages for ratio in target.ratios)
        stage = Stage(-(-i * warmup_steps // config.warmup_stages), dataclasses.replace(target, keep_ratio=ratios))
        cuts = stage.reduction.schedule(num_patches, depth)
        later, later_cuts = found[-1]
        if cuts == later_cuts:
            found[-1] = (Stage(stage.first_step, later.reduction), cuts)
        elif stage.first_step < later.first_step:
            found.append((stage, cuts))
    return tuple(stage for stage, _ in reversed(found))


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """Returns the stage of the step after the first `step` steps."""
    return [stage for stage in stages if stage.first_step <= step][-1]
