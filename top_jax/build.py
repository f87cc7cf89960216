"""Builds what a run's config describes: the model, its sizes and its token reduction."""

from __future__ import annotations

from flax import nnx

from top_jax.config import ModelConfig, PruningConfig
from top_jax.models import abstract_model, create_model, model_config
from top_jax.models.backbone import Backbone
from top_jax.models.sizes import BackboneConfig
from top_jax.pruning import Reduction, make_reduction


def build_reduction(config: PruningConfig) -> Reduction:
    """Returns the token reduction of a config; one without `after_blocks` is the dense model.

    Raises:
        InputError: an unknown method, a setting that it does not have, or a value out of range.
    """
    return make_reduction(**config.settings())


def build_sizes(config: ModelConfig) -> BackboneConfig:
    """Returns the sizes of the config's model, every one set and checked.

    Raises:
        InputError: an unknown model, a size that it does not have, or sizes that do not fit together.
    """
    return model_config(config.name, **config.overrides())


def build_model(config: ModelConfig, reduction: Reduction | None = None, *, rngs: nnx.Rngs | None = None) -> Backbone:
    """Returns the config's model with random weights, in eval mode.

    Args:
        config: the model section of a run's config.
        reduction: how tokens are reduced, such as `build_reduction(config.pruning)`; None is the dense model.
        rngs: source of the initial weights; `nnx.Rngs(0)` if not given.

    Raises:
        InputError: as `build_sizes`, or a reduction that the model cannot have.
    """
    return create_model(config.name, rngs=rngs, pruning=reduction, **config.overrides())


def build_abstract_model(config: ModelConfig, reduction: Reduction | None = None) -> Backbone:
    """Returns the config's model with the shapes of its weights only, to be filled from a checkpoint.

    Arguments and errors as of `build_model`.
    """
    return abstract_model(config.name, pruning=reduction, **config.overrides())
