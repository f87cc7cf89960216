"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from top_jax.models.weights import Weights, join_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; everything in it is checkpointed.

    Attributes:
        step: int32, steps done.
        params: float32 parameters, which the optimizer moves.
        stats: float32 running statistics of BatchNorm, which the forward pass moves; empty without BatchNorm.
        ema: exponential moving average of both, or None.
        opt_state: of the optimizer.
        key: data of the PRNG key from which every step's randomness follows; it never changes.
    """

    step: jax.Array
    params: Weights
    stats: Weights
    ema: Weights | None
    opt_state: Any
    key: jax.Array

    def weights(self) -> dict[str, Weights]:
        """The whole weights worth evaluating and keeping, by name."""
        weights = {"params": join_weights(self.params, self.stats)}
        return weights if self.ema is None else {**weights, "ema": self.ema}


def create_state(
    params: Weights, stats: Weights, optimizer: optax.GradientTransformation, *, seed: int, with_ema: bool
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        ema=jax.tree.map(jnp.copy, join_weights(params, stats)) if with_ema else None,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )
