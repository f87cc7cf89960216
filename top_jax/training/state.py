"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]
"""A model's parameters as a nested dict: `nnx.to_pure_dict(nnx.state(model, nnx.Param))`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; everything in it is checkpointed.

    Attributes:
        step: int32, steps done.
        params: float32 parameters.
        ema: their exponential moving average, or None.
        opt_state: of the optimizer.
        key: data of the PRNG key from which every step's randomness follows; it never changes.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: Any
    key: jax.Array

    def weights(self) -> dict[str, Params]:
        """The weights worth evaluating and keeping, by name."""
        return {"params": self.params} if self.ema is None else {"params": self.params, "ema": self.ema}


def create_state(params: Params, optimizer: optax.GradientTransformation, *, seed: int, with_ema: bool) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )
