"""A model's weights as a plain nested dict: what is saved, converted, averaged and passed to compiled functions."""

from __future__ import annotations

from typing import Any

from flax import nnx

Weights = dict[str, Any]
"""Nested dict of arrays: parameters, and the running statistics of BatchNorm where there is one."""

KINDS = (nnx.Param, nnx.BatchStat)


def weights_of(model: nnx.Module) -> Weights:
    """All of a model's weights."""
    return nnx.to_pure_dict(nnx.state(model, KINDS))
