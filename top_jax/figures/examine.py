"""Runs the forward passes that the pictures need: the model as configured, dense, and with the other alignments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from top_jax.evaluation.trace import Trace, trace
from top_jax.models import Backbone
from top_jax.models.sizes import MambaConfig
from top_jax.models.weights import shapes_only, weights_of
from top_jax.pruning import Evit, Merging, Pruning, Reduction

DENSE = "dense"


class Examination(NamedTuple):
    """The forward passes of one image.

    Attributes:
        traces: by variant (`variants_of`); numpy arrays with a batch axis of 1.
        configured: the variant of the model as configured.
        blocks: the numbers, counted from 1, of the blocks whose attention was computed.
    """

    traces: dict[str, Trace]
    configured: str
    blocks: tuple[int, ...]

    @property
    def own(self) -> Trace:
        """The trace of the model as configured."""
        return self.traces[self.configured]


def variants_of(model: Backbone) -> dict[str, Reduction]:
    """Returns the reductions to compare, by name: dense, without alignment, with each alignment, and as configured.

    Without alignment, ToP is pruned the ViT way: tokens in the order of their scores. A DeiT has no scan to align.
    """
    own = model.reduction
    variants: dict[str, Reduction] = {DENSE: Pruning()}
    if not own.after_blocks:
        return variants
    if isinstance(model.config, MambaConfig) and isinstance(own, Pruning):
        unaligned = dataclasses.replace(own, alignment="none", order="score")
        aligned = [dataclasses.replace(own, alignment=name, order="position") for name in ("hold", "decay")]
        variants |= {name_of(one): one for one in (unaligned, *aligned)}
    elif isinstance(model.config, MambaConfig) and isinstance(own, Merging):
        others = [dataclasses.replace(own, alignment=name) for name in ("none", "hold", "decay")]
        variants |= {name_of(one): one for one in others}
    return variants | {name_of(own): own}


def name_of(reduction: Reduction) -> str:
    """Returns the name of a variant: its alignment, and the order of its tokens where that can be chosen."""
    if not reduction.after_blocks:
        return DENSE
    if isinstance(reduction, Evit):
        return f"EViT, {reduction.order} order"
    if isinstance(reduction, Pruning) and reduction.alignment == "none":
        return f"none, {reduction.order} order"
    return reduction.alignment


def blocks_to_see(model: Backbone) -> tuple[int, ...]:
    """Returns the numbers of the last block that sees all tokens and of the last block."""
    depth = model.config.depth
    return tuple(sorted({min(model.reduction.after_blocks, default=depth), depth}))


def examiner(
    model: Backbone,
    variants: Mapping[str, Reduction],
    blocks: tuple[int, ...],
    *,
    on_pass: Callable[[int], None] = lambda count: None,
) -> Callable[[jax.Array], Examination]:
    """Returns a function that examines one image, float32 `[H, W, 3]`, normalised.

    Each variant is compiled once, at the first image.

    Args:
        model: in eval mode.
        variants: the reductions to run it with, the model's own among them.
        blocks: the numbers, counted from 1, of the blocks whose attention to compute.
        on_pass: called with 1 after each variant's pass, for a progress bar.
    """
    run = jax.jit(trace, static_argnames="attention_of")
    models = {name: with_reduction(model, reduction) for name, reduction in variants.items()}

    def examine(image: jax.Array) -> Examination:
        traces = {}
        for name, variant in models.items():
            traces[name] = jax.tree.map(np.asarray, run(variant, image[None], attention_of=blocks))
            on_pass(1)
        return Examination(traces, name_of(model.reduction), blocks)

    return examine


def with_reduction(model: Backbone, reduction: Reduction) -> Backbone:
    """Returns a model with the same weights, not copied, and another reduction.

    Raises:
        InputError: the model cannot have this reduction.
    """
    build: Any = type(model)
    other = shapes_only(lambda rngs: build(model.config, reduction, rngs=rngs))
    return nnx.merge(nnx.graphdef(other), weights_of(model))
