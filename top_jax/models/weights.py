"""A model's weights as a plain nested dict: what is saved, converted, averaged and passed to compiled functions."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Weights = dict[str, Any]
"""Nested dict of arrays: parameters, and the running statistics of BatchNorm where there is one."""

KINDS = (nnx.Param, nnx.BatchStat)


def weights_of(model: nnx.Module) -> Weights:
    """All of a model's weights; for a model without BatchNorm its parameters."""
    return nnx.to_pure_dict(nnx.state(model, KINDS))


def parameter_count(model: nnx.Module) -> int:
    """How many numbers it learns; shapes are enough."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def variables_by_path(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """The variables that hold them, by path such as ("blocks", 0, "norm", "scale")."""
    return dict(nnx.to_flat_state(nnx.state(model, KINDS)))


def statistics_of(model: nnx.Module) -> Weights:
    """The running statistics among them; an empty dict without BatchNorm."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def split_weights(weights: Weights, like: Weights) -> tuple[Weights, Weights]:
    """Parameters and statistics apart; the statistics are what stands where something stands in `like`."""
    flat, paths = flatten_dict(weights), flatten_dict(like).keys()
    params = {path: leaf for path, leaf in flat.items() if path not in paths}
    return unflatten_dict(params), unflatten_dict({path: flat[path] for path in paths})


def join_weights(params: Weights, stats: Weights) -> Weights:
    """The inverse of `split_weights`."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(stats))
