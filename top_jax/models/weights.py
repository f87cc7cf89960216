"""A model's weights as a plain nested dict, which is saved, converted, averaged and passed to compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Weights = dict[str, Any]
"""Nested dict of arrays: parameters, and the running statistics of BatchNorm if the model has one."""

KINDS = (nnx.Param, nnx.BatchStat)


class _AnyKey(nnx.Rngs):
    """Gives every weight the same key, because shapes do not depend on keys.

    nnx.Rngs counts the keys it returns. Under tracing, each step of the counter searches the whole program (flax 0.12),
    which made building a deep model three times slower.
    """

    def params(self) -> jax.Array:
        return self.default.key[...]


def shapes_only(build: Callable[[nnx.Rngs], Any]) -> Any:
    """Returns the model that `build` makes, in eval mode, each weight a `jax.ShapeDtypeStruct`; nothing is computed."""
    model = nnx.eval_shape(lambda: build(_AnyKey(0)))
    model.eval()
    return model


def weights_of(model: nnx.Module) -> Weights:
    """Returns all weights of a model: parameters and running statistics."""
    return nnx.to_pure_dict(nnx.state(model, KINDS))


def parameter_count(model: nnx.Module) -> int:
    """Returns the number of learned values of a model with weights, or with only their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def variables_by_path(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """Returns the variables that hold the weights, by path such as ("blocks", 0, "norm", "scale")."""
    return dict(nnx.to_flat_state(nnx.state(model, KINDS)))


def is_of_classes(path: Sequence[Any]) -> bool:
    """Returns whether the weight at a path belongs to the last layer, whose last axis is the classes."""
    return path[0] == "head" or "conv_seg" in path


def statistics_of(model: nnx.Module) -> Weights:
    """Returns the running statistics only; an empty dict without BatchNorm."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def split_weights(weights: Weights, like: Weights) -> tuple[Weights, Weights]:
    """Returns parameters and statistics separately; the statistics are the entries whose paths are in `like`."""
    flat, paths = flatten_dict(weights), flatten_dict(like).keys()
    params = {path: leaf for path, leaf in flat.items() if path not in paths}
    return unflatten_dict(params), unflatten_dict({path: flat[path] for path in paths})


def join_weights(params: Weights, stats: Weights) -> Weights:
    """Returns all weights from parameters and statistics; the inverse of `split_weights`."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(stats))
