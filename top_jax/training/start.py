"""The state with which a start of a run begins: its newest checkpoint, or its first weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from top_jax.config import RunConfig
from top_jax.models import Backbone
from top_jax.models.weights import Weights, split_weights, statistics_of
from top_jax.sharding import in_parts
from top_jax.training.checkpoints import Checkpoints, Position
from top_jax.training.plan import Plan
from top_jax.training.saved_weights import abstract_weights
from top_jax.training.state import TrainState, create_state
from top_jax.training.weights import initial_weights


def start_or_resume(plan: Plan, checkpoints: Checkpoints, weights: Weights | None) -> tuple[TrainState, Position]:
    """The newest checkpoint, or a fresh state from `weights` (made here where they are not given)."""
    parts = plan.config, plan.model, plan.optimizer, plan.mesh
    if restored := checkpoints.restore(_layout(*parts)[1]):
        return restored
    state = first_state(*parts, weights or initial_weights(plan.config))
    return state, {"batches": 0, "skipped": [], "evaluated": 1}


def first_state(
    config: RunConfig, model: Backbone, optimizer: optax.GradientTransformation, mesh: Mesh, weights: Weights
) -> TrainState:
    """The state before the first step, over the mesh as `top_jax.sharding.in_parts` says.

    Args:
        config: seed, and whether an average is kept.
        model: shapes are enough.
        optimizer: of the run.
        mesh: of all devices.
        weights: all of the model's, the same in every process.
    """
    create, layout = _layout(config, model, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    # Through the host: in several processes a compiled function takes arrays of one of them only as NumPy's.
    return jax.jit(create, out_shardings=shardings)(jax.device_get(weights))


def _layout(
    config: RunConfig, model: Backbone, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[[Weights], TrainState], Any]:
    """What makes a state of weights, and the state's shapes and shardings."""

    def create(weights: Weights) -> TrainState:
        params, stats = split_weights(weights, like=statistics_of(model))
        with_ema = config.optimizer.ema_decay is not None
        return create_state(params, stats, optimizer, seed=config.seed, with_ema=with_ema)

    shapes = jax.eval_shape(create, abstract_weights(config.model))
    place = lambda a, on: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on)  # noqa: E731
    return create, jax.tree.map(place, shapes, in_parts(mesh, shapes))
