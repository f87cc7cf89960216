"""The compiled training steps of a run, and the cache that keeps compiled programs between processes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from top_jax import distributed
from top_jax.data import DeviceBatch
from top_jax.memory import program_memory
from top_jax.models.weights import Weights
from top_jax.sharding import in_parts, replicated
from top_jax.training.keep_ratio_warmup import Stage, stage_at
from top_jax.training.prepare import Plan
from top_jax.training.steps import Metrics, TrainState, make_train_step


class TrainPrograms:
    """The training step of each stage of the keep-ratio warm-up, compiled when the stage starts.

    Args:
        plan: the run's plan.
        teacher_weights: weights of the dense model; given exactly when the plan has a teacher.
    """

    def __init__(self, plan: Plan, teacher_weights: Weights | None):
        self._plan = plan
        # Laid out like the student's weights, so that with FSDP no device holds all of them either.
        self._teacher_weights = distributed.to_global(teacher_weights, in_parts(plan.mesh, teacher_weights))
        self._compiled: dict[Stage, jax.stages.Compiled] = {}

    def __call__(self, step: int, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """Runs the step after the first `step` steps; the state's memory is reused (donated)."""
        return self.compile(step, state, batch)(state, batch, self._teacher_weights)

    def compile(self, step: int, state: TrainState, batch: DeviceBatch) -> jax.stages.Compiled:
        """Returns the program of the step after the first `step` steps, compiling it at the first call of its stage."""
        stage = stage_at(self._plan.stages, step)
        if stage not in self._compiled:
            function = make_train_step(
                self._plan.graph(stage.reduction), self._plan.optimizer, self._plan.config, self._plan.teacher
            )
            # Donating the state's memory needs results that are laid out as the state is now.
            shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(self._plan.mesh))
            program = jax.jit(function, donate_argnums=0, out_shardings=shardings)
            self._compiled[stage] = program.lower(state, batch, self._teacher_weights).compile()
        return self._compiled[stage]

    def is_compiled(self, step: int) -> bool:
        """Whether the step after the first `step` steps is compiled already."""
        return stage_at(self._plan.stages, step) in self._compiled

    def memory(self) -> dict[str, int]:
        """Returns the memory of the largest program so far on each device, in bytes; empty before the first step."""
        plans = (program_memory(program) for program in self._compiled.values())
        return max(plans, key=lambda plan: plan.get("total", 0), default={})


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR is set.

    Its folder is $XDG_CACHE_HOME/top_jax (by default ~/.cache/top_jax). It holds programs that took over a second to
    compile.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "top_jax" / "xla"))
