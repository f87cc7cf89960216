"""Builds what a run's config describes: the model, its sizes and its token reduction."""

from __future__ import annotations

import dataclasses

from flax import nnx

from top_jax.config import ModelConfig, PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.models import (
    Segmenter,
    SegmenterConfig,
    VimConfig,
    abstract_model,
    abstract_segmenter,
    create_model,
    create_segmenter,
    model_config,
    segmenter_config,
)
from top_jax.models.backbone import Backbone
from top_jax.models.sizes import BackboneConfig
from top_jax.pruning import Reduction, make_reduction
from top_jax.values import height_width

Model = Backbone | Segmenter

_NOT_SIZES = ("fill", "inference", "slide_stride")  # settings of a segmenter that its weights do not depend on


def build_reduction(config: PruningConfig) -> Reduction:
    """Returns the token reduction of a config; one without `after_blocks` is the dense model.

    Raises:
        InputError: an unknown method, a setting that it does not have, or a value out of range.
    """
    return make_reduction(**config.settings())


def build_sizes(config: ModelConfig) -> BackboneConfig:
    """Returns the sizes of the config's model (for a segmenter, of its backbone), all of them set and checked.

    Raises:
        InputError: an unknown model, a size that it does not have, or sizes that do not fit together.
    """
    if config.is_segmenter:
        return dataclasses.replace(segmenter_sizes(config).backbone, num_classes=config.num_classes)
    return model_config(config.name, **config.overrides())


def segmenter_sizes(config: ModelConfig) -> SegmenterConfig:
    """Returns the sizes of the config's segmenter; errors as for `build_sizes`."""
    heads = {name: value for name, value in config.segmenter().items() if name not in _NOT_SIZES}
    return segmenter_config(config.name, **heads, **config.overrides())


def crop_size(config: RunConfig) -> tuple[int, int]:
    """Returns the (height, width) of the images that a run trains on: the model's, or a segmenter's `data.crop_size`.

    Raises:
        InputError: as `build_sizes`, or a crop size other than the `img_size` of a ViM.
    """
    sizes = build_sizes(config.model)
    if config.data.crop_size is None:
        return sizes.img_size
    crop = height_width("config.data.crop_size", config.data.crop_size)
    if crop != sizes.img_size and isinstance(sizes, VimConfig):
        raise InputError(
            f"config.data.crop_size={crop}, but a ViM takes images of its img_size={sizes.img_size} only; set "
            "config.model.img_size, and leave crop_size out."
        )
    return crop


def build_model(config: ModelConfig, reduction: Reduction | None = None, *, rngs: nnx.Rngs | None = None) -> Model:
    """Returns the config's model with random weights, in eval mode.

    Args:
        config: the model section of a run's config.
        reduction: how tokens are reduced, such as `build_reduction(config.pruning)`; None is the dense model.
        rngs: source of the initial weights; `nnx.Rngs(0)` if not given.

    Raises:
        InputError: as `build_sizes`, or a reduction that the model cannot have.
    """
    if config.is_segmenter:
        return create_segmenter(config.name, rngs=rngs, pruning=reduction, **config.segmenter(), **config.overrides())
    return create_model(config.name, rngs=rngs, pruning=reduction, **config.overrides())


def build_abstract_model(config: ModelConfig, reduction: Reduction | None = None) -> Model:
    """Returns the config's model with the shapes of its weights only, to be filled from a checkpoint.

    Arguments and errors as for `build_model`.
    """
    if config.is_segmenter:
        return abstract_segmenter(config.name, pruning=reduction, **config.segmenter(), **config.overrides())
    return abstract_model(config.name, pruning=reduction, **config.overrides())


def backbone_of(model: Model) -> Backbone:
    """Returns the backbone of a segmenter; a classifier is its own backbone."""
    return model.backbone if isinstance(model, Segmenter) else model


def as_classifier(model: Model, what: str, name: str = "the model") -> Backbone:
    """Returns the model if it is a classifier; errors refer to it as `name`.

    Raises:
        InputError: it is a segmenter, and `what` does not work for one.
    """
    if isinstance(model, Segmenter):
        raise not_a_classifier(what, name)
    return model


def not_a_classifier(what: str, name: str) -> InputError:
    """Returns the error for passing the segmenter `name` to `what`, which needs a classifier."""
    return InputError(
        f"{name} is a segmenter, and {what} works for classifiers only; use top_jax.segment or top-jax visualize "
        "(docs/guides/segmentation.md)."
    )
