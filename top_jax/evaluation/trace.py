"""A forward pass that records token reduction: the tokens that stayed, their scores, scan orders and attention.

Shapes are static, so it can run as one program: `jax.jit(trace, static_argnames="attention_of")`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from top_jax.evaluation.hidden_attention import hidden_attention
from top_jax.models import Backbone
from top_jax.models.backbone import BlockRun
from top_jax.models.deit import DeitBlock
from top_jax.models.features import make_features
from top_jax.pruning import Cut, Tokens
from top_jax.typing import Array, Float, Images, Int, Logits

CLASS = -1
"""Index of the class token in a trace, instead of a patch's raster index."""
FUSED = -2
"""Index of a fused token (EViT) in a trace; it stands for several patches."""


class TracedStage(NamedTuple):
    """Record of one reduction.

    Attributes:
        candidates: int32 `[B, K]` raster index of each patch token before it, `FUSED` for a fused one.
        scores: float32 `[B, K]` scores of the candidates, of which the largest stay; None for merging, which has none.
        survivors: int32 `[B, L]` raster index of each token after it, in their order; `CLASS` or `FUSED` for others.
        source: int32 `[B, M]` which patch token after it (0..K'-1, not counting the class token) stands for each patch
            of the image, -1 if none does.
    """

    candidates: Int[Array, "B K"]
    scores: Float[Array, "B K"] | None
    survivors: Int[Array, "B L"]
    source: Int[Array, "B M"]


class BlockView(NamedTuple):
    """Token interactions in one block: their order in its scans, and their attention.

    Attributes:
        places: int32 `[B, L]` raster index of each token, in the block's order; `CLASS` or `FUSED` for others.
        orders: int32 `[G, B, L]` the token that each step of each scan visits; None without a scan.
        attention: float32 `[B, L, L]` weight of each token's input (third axis) in each token's output; None if it was
            not requested. It is the scan's hidden attention |alpha|, averaged over the channels, or DeiT's attention,
            averaged over the heads.
    """

    places: Int[Array, "B L"]
    orders: Int[Array, "G B L"] | None
    attention: Float[Array, "B L L"] | None


class Trace(NamedTuple):
    """Record of the forward pass of a batch.

    Attributes:
        logits: float32 `[B, classes]`.
        stages: record of each reduction, by its block's 1-based number.
        blocks: token interactions in each block, by its 1-based number.
    """

    logits: Logits
    stages: dict[int, TracedStage]
    blocks: dict[int, BlockView]


def trace(model: Backbone, images: Images, *, attention_of: tuple[int, ...] = ()) -> Trace:
    """Runs the model and records its token reduction.

    Args:
        model: a model in eval mode.
        images: float32 `[B, H, W, 3]`, normalised.
        attention_of: 1-based numbers of the blocks whose attention is computed; each costs `[B, L, L]` numbers and a
            loop over the channels.

    Raises:
        InputError: the images do not have the model's size.
    """
    cuts = {cut.block: cut for cut in model.schedule}
    stages: dict[int, TracedStage] = {}
    views: dict[int, BlockView] = {}

    def watch(run: BlockRun) -> None:
        if run.number in cuts:
            stages[run.number] = _traced_stage(model, run, cuts[run.number])
        views[run.number] = _view(run, attend=run.number in attention_of)

    logits = model.classify(model.features(images, watch=watch))
    return Trace(logits, stages, views)


def places_of(tokens: Tokens) -> Int[Array, "B L"]:
    """Returns the raster index of each token, int32 `[B, L]`: `CLASS` for the class token, `FUSED` for a fused one."""
    positions = tokens.positions
    fused = positions < 0
    if tokens.cls_index is not None:
        own = jnp.take_along_axis(positions, tokens.cls_index[:, None], axis=1)
        is_class = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :] == tokens.cls_index[:, None]
        positions = jnp.where(is_class, CLASS, positions - (positions > own).astype(positions.dtype))
    return jnp.where(fused, FUSED, positions)


def _traced_stage(model: Backbone, run: BlockRun, cut: Cut) -> TracedStage:
    return TracedStage(
        candidates=jnp.take_along_axis(places_of(run.mixed), run.mixed.patch_slots(), axis=1),
        scores=model.reduction.scores(run.mixed, run.evidence, cut),
        survivors=places_of(run.leaving),
        source=make_features(run.leaving, run.leaving.grid or model.config.grid).source,
    )


def _view(run: BlockRun, *, attend: bool) -> BlockView:
    places = places_of(run.entering)
    if isinstance(run.block, DeitBlock):
        return BlockView(places, None, run.block.attention(run.entering) if attend else None)
    found = run.block.scan_arguments(run.entering, run.paths)
    assert found is not None  # every block but DeiT's has a scan
    scan, plan = found
    order = jnp.arange(places.shape[1], dtype=jnp.int32)[None, None, :] if scan.order is None else scan.order
    orders = jnp.broadcast_to(order, (len(plan.reverse), *places.shape))
    backwards = jnp.asarray(plan.reverse)[:, None, None]
    orders = jnp.where(backwards, jnp.flip(orders, axis=-1), orders)
    return BlockView(places, orders, hidden_attention(scan, plan) if attend else None)
