"""The compiled training steps of a run: one for each stage of the keep-ratio warm-up."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from top_jax import distributed
from top_jax.build import build_abstract_model
from top_jax.memory import step_memory
from top_jax.models.weights import Weights
from top_jax.sharding import in_parts, replicated
from top_jax.training.keep_ratio import Stage, stage_at
from top_jax.training.plan import Plan
from top_jax.training.state import TrainState
from top_jax.training.steps import DeviceBatch, Metrics, make_train_step
from top_jax.training.teacher import Teacher


class TrainPrograms:
    """`(state, batch) -> (state, metrics)`, compiled when the first step of its stage comes; the state is donated."""

    def __init__(self, plan: Plan, teacher: Teacher | None):
        self._plan = plan
        self._teacher, weights = (None, None) if teacher is None else teacher
        # Laid out as the student's, so that with FSDP no device holds all of them either.
        self._teacher_weights = distributed.to_global(weights, in_parts(plan.mesh, weights))
        self._compiled: dict[Stage, jax.stages.Compiled] = {}

    def stage(self, step: int) -> Stage:
        """The stage in which the step after `step` steps runs."""
        return stage_at(self._plan.stages, step)

    def is_compiled(self, step: int) -> bool:
        """Whether the next step can start at once."""
        return self.stage(step) in self._compiled

    def __call__(self, step: int, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """The step after `step` steps."""
        stage = self.stage(step)
        if stage not in self._compiled:
            self._compiled[stage] = self._compile(stage, state, batch)
        return self._compiled[stage](state, batch, self._teacher_weights)

    def program(self, step: int) -> jax.stages.Compiled:
        """What that step runs, once it is compiled."""
        return self._compiled[self.stage(step)]

    def memory(self) -> dict[str, int]:
        """What the largest of the programs so far takes on each device, in bytes; empty before the first step."""
        plans = (step_memory(program) for program in self._compiled.values())
        return max(plans, key=lambda plan: plan.get("total", 0), default={})

    def _compile(self, stage: Stage, state: TrainState, batch: DeviceBatch) -> jax.stages.Compiled:
        plan, config = self._plan, self._plan.config
        model = build_abstract_model(config.model, stage.reduction)
        step = make_train_step(nnx.graphdef(model), plan.optimizer, config, self._teacher)
        return compile_step(step, plan.mesh, state, batch, self._teacher_weights)


def compile_step(
    step: Callable[..., tuple[TrainState, Metrics]],
    mesh: Mesh,
    state: TrainState,
    batch: DeviceBatch,
    teacher_weights: Weights | None,
) -> jax.stages.Compiled:
    """`step(state, batch, teacher_weights)` of `make_train_step`, compiled for these; it takes the state's memory."""
    # Results lie as the state lies now: that is what makes donating it worth while.
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
    program = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return program.lower(state, batch, teacher_weights).compile()
