"""The state with which a start of a run begins: its newest checkpoint, or its first weights."""

from __future__ import annotations

import jax

from top_jax.models.weights import Weights, split_weights, statistics_of
from top_jax.sharding import in_parts
from top_jax.training.checkpoints import Checkpoints, Position
from top_jax.training.plan import Plan
from top_jax.training.saved_weights import abstract_weights
from top_jax.training.state import TrainState, create_state
from top_jax.training.weights import initial_weights


def start_or_resume(plan: Plan, checkpoints: Checkpoints, weights: Weights | None) -> tuple[TrainState, Position]:
    """The newest checkpoint, or a fresh state from `weights` (made here where they are not given).

    Weights, their averages and the optimizer's moments lie over the mesh as `top_jax.sharding.in_parts` says.
    """
    config = plan.config

    def create(weights: Weights) -> TrainState:
        params, stats = split_weights(weights, like=statistics_of(plan.model))
        with_ema = config.optimizer.ema_decay is not None
        return create_state(params, stats, plan.optimizer, seed=config.seed, with_ema=with_ema)

    shapes = jax.eval_shape(create, abstract_weights(config.model))
    shardings = in_parts(plan.mesh, shapes)
    like = jax.tree.map(lambda a, on: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), shapes, shardings)
    if restored := checkpoints.restore(like):
        return restored
    # Through the host: in several processes a compiled function takes arrays of one of them only as NumPy's.
    host = jax.device_get(weights or initial_weights(config))
    return jax.jit(create, out_shardings=shardings)(host), {"batches": 0, "skipped": [], "evaluated": 1}
