"""Runs a model as configured, dense and with the other alignments, and collects the arrays that pictures show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from flax import nnx

from top_jax.evaluation.trace import CLASS, FUSED, BlockView, Trace, trace
from top_jax.models import Backbone
from top_jax.models.sizes import MambaConfig
from top_jax.models.weights import shapes_only, weights_of
from top_jax.pruning import Evit, Merging, Pruning, Reduction

DENSE: Final = "dense"
ALIGNED: Final = ("hold", "decay")
ARRAYS: Final = {
    "photo": "uint8 [h, w, 3]: the part of the image that the model sees, at the drawn resolution",
    "grid": "int [2]: rows and columns of patches; M = rows x columns, and a place is a raster index 0..M-1",
    "logits": "float32 [classes]: logits of the model as configured",
    "after_blocks": "int32 [S]: blocks, counted from 1, after which tokens were reduced",
    "source": "int32 [S, M]: index of the token that represents each patch after each reduction, -1 for a dropped "
    "patch; merged patches share an index",
    "kept": "bool [S, M]: source >= 0",
    "tokens": "int32 [S]: number of remaining tokens, without the class token",
    "fused": "int32 [S]: how many of them are fused tokens, which represent no single patch",
    "scores": "float32 [S, M]: scores that tokens were ranked by, NaN for patches dropped earlier; absent if "
    "the method ranks no tokens",
    "path/VARIANT": "int32 [G, L]: place of the token at each step of each scan in the block after the first "
    "reduction; -1 class token, -2 fused token",
    "gaps/VARIANT": "int32 [G, L]: number of dropped tokens that an aligned scan passes before each step",
    "attention/VARIANT/BLOCK": "float32 [L, L]: weight of each token's input (second axis) in each token's output: "
    "|alpha| of the sum of all directions, averaged over channels (a DeiT: attention averaged over heads)",
    "places/VARIANT/BLOCK": "int32 [L]: place of each of those tokens",
    "attention_map/VARIANT/BLOCK": "float32 [M]: what is drawn: the class token's row (or the mean of all rows) "
    "divided by its mean over the patches, NaN where there is no token",
}
"""The arrays of a .npz by name; VARIANT is named as in the picture, BLOCK is a number counted from 1."""

Arrays = dict[str, np.ndarray]


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

    The variant without alignment prunes as a ViT does: tokens in the order of their scores. A DeiT has no scan.
    """
    own = model.reduction
    variants: dict[str, Reduction] = {DENSE: Pruning()}
    if not own.after_blocks:
        return variants
    if isinstance(model.config, MambaConfig) and isinstance(own, Pruning):
        unaligned = dataclasses.replace(own, alignment="none", order="score")
        aligned = [dataclasses.replace(own, alignment=name, order="position") for name in ALIGNED]
        variants |= {name_of(one): one for one in (unaligned, *aligned)}
    elif isinstance(model.config, MambaConfig) and isinstance(own, Merging):
        others = [dataclasses.replace(own, alignment=name) for name in ("none", *ALIGNED)]
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


def arrays_of(examination: Examination, num_patches: int) -> Arrays:
    """Returns the arrays of an image with M = `num_patches` that `ARRAYS` explains, without `photo` and `grid`."""
    own = examination.own
    arrays = {"logits": np.asarray(own.logits[0]), **_tokens(own, num_patches), **_paths(examination)}
    views = {f"{name}/{b}": one.blocks[b] for b in examination.blocks for name, one in examination.traces.items()}
    arrays |= {f"attention/{key}": _attention(view) for key, view in views.items()}
    arrays |= {f"places/{key}": np.asarray(view.places[0]) for key, view in views.items()}
    return arrays | {f"attention_map/{key}": _attention_map(view, num_patches) for key, view in views.items()}


def _tokens(trace: Trace, num_patches: int) -> Arrays:
    """Returns the tokens that are left after each reduction, and the scores if the method ranks tokens."""
    stages = trace.stages.values()
    left = [stage.survivors[0] for stage in stages]
    source = np.array([stage.source[0] for stage in stages], np.int32).reshape(len(left), num_patches)
    arrays = {
        "after_blocks": np.array(list(trace.stages), np.int32),
        "source": source,
        "tokens": np.array([np.sum(places != CLASS) for places in left], np.int32),
        "fused": np.array([np.sum(places == FUSED) for places in left], np.int32),
        "kept": source >= 0,
    }
    ranked = [(stage.candidates[0], stage.scores[0]) for stage in stages if stage.scores is not None]
    if not ranked:
        return arrays
    scores = np.full((len(ranked), num_patches), np.nan, np.float32)
    for row, (places, values) in zip(scores, ranked, strict=True):
        row[places[places >= 0]] = values[places >= 0]  # without fused tokens (EViT), which belong to no patch
    return {**arrays, "scores": scores}


def _paths(examination: Examination) -> Arrays:
    """Returns the paths of the scans; none for a model without scans, and without the dense variant."""
    block = min(examination.own.stages, default=0) + 1
    views = {name: one.blocks[block] for name, one in examination.traces.items()}
    if DENSE not in views or any(view.orders is None for view in views.values()):
        return {}
    paths = {name: np.asarray(view.places[0])[np.asarray(view.orders)[:, 0]] for name, view in views.items()}
    gaps = {name: _gaps(paths[DENSE], path) if name in ALIGNED else np.zeros_like(path) for name, path in paths.items()}
    return {f"path/{name}": path for name, path in paths.items()} | {f"gaps/{name}": gap for name, gap in gaps.items()}


def _gaps(whole: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Returns how many steps of the dense path `[G, M]` are missing before each step of a pruned path `[G, L]`."""
    gaps = np.zeros_like(steps)
    for g in range(len(whole)):
        step_of = {int(place): step for step, place in enumerate(whole[g])}
        gaps[g, 1:] = np.diff([step_of[int(place)] for place in steps[g]]) - 1
    return gaps


def _attention(view: BlockView) -> np.ndarray:
    assert view.attention is not None
    return np.asarray(view.attention[0])


def _attention_map(view: BlockView, num_patches: int) -> np.ndarray:
    """Returns the attention of the class token, or of the average token in a model without one, to each patch."""
    matrix, places = _attention(view), view.places[0]
    seen = matrix[places == CLASS].mean(axis=0) if (places == CLASS).any() else matrix.mean(axis=0)
    weights = np.full(num_patches, np.nan, np.float32)
    weights[places[places >= 0]] = seen[places >= 0] / seen[places >= 0].mean()
    return weights
