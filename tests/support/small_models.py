"""Models of the tests' size, with weights that hide nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from top_jax.models import abstract_model


@functools.cache
def _abstract(name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    return abstract_model(name, **dict(settings))


def model_of_shapes(name: str, **settings: Any) -> Any:
    """Returns `abstract_model(name, **settings)`, a copy of one that is built once: building takes 20 times as long."""
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return nnx.clone(_abstract(name, tuple(sorted(frozen.items()))))


def random_model(name: str, *, scale: float, **settings: Any) -> Any:
    """Builds a model in eval mode whose every weight is random; equal settings give equal weights.

    Initial values hide mistakes: a bias of 0, a norm's scale of 1 or a variance of 1 changes nothing.

    Args:
        name: as for `create_model`.
        scale: standard deviation of the parameters; BatchNorm's statistics are uniform in 0.5 .. 1.5.
        **settings: as for `create_model`.
    """
    return filled(model_of_shapes(name, **settings), scale=scale)


def filled(model: Any, *, scale: float, seed: int = 0) -> Any:
    """Gives a model of shapes the random weights of `random_model`, in place: JAX would compile each initial value.

    `jnp.asarray` compiles a program for each shape, `jax.device_put` none.
    """
    rng = np.random.default_rng(seed)
    draw = lambda weight: jax.device_put((rng.normal(size=weight.shape) * scale).astype(weight.dtype))  # noqa: E731
    positive = lambda weight: jax.device_put(rng.uniform(0.5, 1.5, size=weight.shape).astype(weight.dtype))  # noqa: E731
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(draw, params), jax.tree.map(positive, statistics))
    return model
