"""Warm-up of the keep ratio: a run starts dense and comes to its pruning in a few stages, each one compiled program.

EViT lowers the ratio from 1 with every step, along half a cosine (arXiv 2202.07800; youweiliang/evit, helpers.py,
`adjust_keep_rate`). Static shapes would make each count a program, so here it goes in few equal steps: that is ours.
"""

from __future__ import annotations

import dataclasses

from top_jax.build import build_reduction
from top_jax.config import PruningConfig
from top_jax.errors import InputError
from top_jax.pruning import Reduction


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run in which the model keeps as many tokens all the time.

    Attributes:
        first_step: steps that are done before its first one.
        reduction: what the model prunes by, from then on.
    """

    first_step: int
    reduction: Reduction


def stages(
    config: PruningConfig, *, num_patches: int, depth: int, steps_per_epoch: float, total_steps: int
) -> tuple[Stage, ...]:
    """The stages of a run: a function of its settings alone, so that a resumed run goes on in the right one.

    The warm-up takes W = round(warmup_epochs x steps_per_epoch) steps. Its stage i of S = warmup_stages, i from 0,
    starts at step ceil(i W / S) and keeps 1 - (1 - r) i / S where the config keeps r: the first is the dense model. At
    step W the config's own ratios follow. A stage that would keep the same tokens as the one before it is left out, as
    is one of no steps.

    Args:
        config: with or without a warm-up; without one there is one stage.
        num_patches: M of the model.
        depth: blocks of the model.
        steps_per_epoch: batches in an epoch.
        total_steps: of the run.

    Returns:
        At least one stage, by first_step from 0; the last has exactly the config's reduction.

    Raises:
        InputError: a warm-up of a dense model, one that leaves no step to the target, or counts that the method
            cannot keep at some stage.
    """
    target = build_reduction(config)
    cuts = target.schedule(num_patches, depth)
    if not config.warmup_epochs:
        return (Stage(0, target),)
    if not target.after_blocks:
        raise InputError(
            f"pruning.warmup_epochs={config.warmup_epochs} warms up to a pruning that is not there; set "
            "pruning.after_blocks, or warmup_epochs=0."
        )
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise InputError(
            f"pruning.warmup_epochs={config.warmup_epochs} is {warmup_steps} steps, and the run has {total_steps}, "
            "which leaves none to the pruning itself; use fewer epochs, or train longer."
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
    """The stage in which the step after `step` done ones runs."""
    return [stage for stage in stages if stage.first_step <= step][-1]
