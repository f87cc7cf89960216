from __future__ import annotations

import dataclasses

from top_jax.pruning import make_reduction


@dataclasses.dataclass(frozen=True)
class Stage:
    first_step: int
    reduction: object


def stages(config, *, steps_per_epoch, total_steps):
    return (Stage(0, make_reduction(**config.settings())),)


def stage_at(stages, step):
    return [s for s in stages if s.first_step <= step][-1]
