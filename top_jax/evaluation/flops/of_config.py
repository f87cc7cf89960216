"""Cost of a config's model, checked against the model that JAX traces: the data of `top-jax flops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.build import build_reduction, build_sizes, crop_size, segmenter_sizes
from top_jax.config import RunConfig
from top_jax.evaluation.flops.count import Cost, count_macs
from top_jax.evaluation.flops.parts import SCAN_MULTIPLICATIONS, SCAN_OPERATIONS
from top_jax.evaluation.flops.traced import Multiplications, count_multiplications
from top_jax.models import Backbone, BackboneConfig, Segmenter, SegmenterConfig
from top_jax.models.registry import BACKBONES
from top_jax.models.sizes import MambaConfig
from top_jax.models.weights import parameter_count, shapes_only
from top_jax.pruning import Reduction

CHECK_STEPS: Final = 2  # how often `check_config` calls `on_step`


class TracedModel(NamedTuple):
    """A model's traced forward pass of one image; its scans are plain XLA operations whatever the config sets.

    Attributes:
        traced: `jax.stages.Traced`.
        parameters: number of learned values.
        platform: JAX's default platform, for which it is lowered.
    """

    traced: Any
    parameters: int
    platform: str


def count_config(config: RunConfig) -> dict[str, Any]:
    """Counts the config's model with its reduction, and dense; returns JSON values.

    Raises:
        InputError: impossible sizes, or a reduction that the model cannot have.
    """
    sizes, image, reduction = _sizes_of(config), crop_size(config), build_reduction(config.pruning)
    cost, dense = count_macs(sizes, reduction, img_size=image), count_macs(sizes, img_size=image)
    backbone = sizes.backbone if isinstance(sizes, SegmenterConfig) else sizes
    return {
        "model": config.model.name,
        "img_size": list(image),
        "pruning": config.pruning.settings(),
        "class_token": backbone.CLASS_TOKEN is not None,
        "tokens_per_block": list(cost.tokens_per_block),
        **cost.in_gmacs(),
        **{f"dense_{name}": gmacs for name, gmacs in dense.in_gmacs().items()},
        "parts": {name: cost.parts(name) for name in cost.macs},
        "dense_parts": {name: dense.parts(name) for name in dense.macs},
        "blocks": {name: list(blocks) for name, blocks in cost.blocks.items()},
    }


def costs(config: RunConfig) -> dict[str, Any]:
    """Returns the part of `count_config` that is reported: tokens per block, and GMACs, also of the dense model."""
    counts = count_config(config)
    names = ("tokens_per_block", "gmacs", "dense_gmacs", "backbone_gmacs", "dense_backbone_gmacs")
    return {name: counts[name] for name in names if name in counts}


def cost_of(config: RunConfig, reduction: Reduction) -> Cost:
    """Counts the cost of one image with another reduction; arguments and errors as for `count_macs`."""
    return count_macs(_sizes_of(config), reduction, img_size=crop_size(config))


def check_config(config: RunConfig, *, on_step: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """Counts parameters, and compares the `executed` count with the traced model's; returns JSON values.

    Args:
        config: the run's config.
        on_step: called with 1 when the model is traced and when it is counted, for a progress bar.

    Raises:
        InputError: impossible sizes, or a reduction that the model cannot have.
    """
    sizes, image, reduction = _sizes_of(config), crop_size(config), build_reduction(config.pruning)
    model = trace_model(sizes, reduction, img_size=image)
    on_step(1)
    counted, without_scans, scans = check_executed(model, count_macs(sizes, reduction, img_size=image))
    on_step(1)
    check = {
        "platform": model.platform,
        "dtype": config.model.dtype,
        "jaxpr": counted._asdict(),
        "jaxpr_above_executed": {"without_scans": without_scans, "scans": scans},
    }
    return {"parameters": model.parameters, "cross_check": check}


def _sizes_of(config: RunConfig) -> BackboneConfig | SegmenterConfig:
    return segmenter_sizes(config.model) if config.model.is_segmenter else build_sizes(config.model)


def trace_model(
    config: BackboneConfig | SegmenterConfig, pruning: Reduction | None, *, img_size: tuple[int, int] | None = None
) -> TracedModel:
    """Traces the model without creating its weights; `img_size` as for `count_macs`.

    Raises:
        InputError: a reduction that the model cannot have.
    """
    if isinstance(config, SegmenterConfig):
        backbone = dataclasses.replace(config.backbone, implementation="xla")
        config = dataclasses.replace(config, backbone=backbone)
    elif isinstance(config, MambaConfig):
        backbone = config = dataclasses.replace(config, implementation="xla")
    else:
        backbone = config

    def build(rngs: nnx.Rngs) -> Backbone | Segmenter:
        if isinstance(config, SegmenterConfig):
            return Segmenter(config, pruning, rngs=rngs)
        return BACKBONES[type(config)](config, pruning, rngs=rngs)

    model = shapes_only(build)
    image = jax.ShapeDtypeStruct((1, *(backbone.img_size if img_size is None else img_size), 3), jnp.float32)
    traced = jax.jit(lambda model, image: model(image)).trace(model, image)
    return TracedModel(traced, parameter_count(model), jax.default_backend())


def check_executed(model: TracedModel, cost: Cost) -> tuple[Multiplications, int, int]:
    """Compares the `executed` count with the multiplications in the model's jaxpr.

    Returns:
        The jaxpr's multiplications, and by how many they exceed `cost`, outside the scans and in them.
    """
    counted, parts = count_multiplications(model.traced.jaxpr, model.platform), cost.parts("executed")
    scan = parts.get("scan", 0)
    multiplications = scan // SCAN_OPERATIONS * SCAN_MULTIPLICATIONS
    return counted, counted.products + counted.taps - (sum(parts.values()) - scan), counted.loops - multiplications
