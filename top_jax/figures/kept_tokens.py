"""Which patches are still there after each reduction, on the photo itself."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable

from top_jax.evaluation.trace import CLASS, FUSED, Trace
from top_jax.figures.page import VERMILLION, Panel, Section, draw_borders, draw_grid, draw_map, draw_photo
from top_jax.figures.photo import Photo


class KeptTokens(NamedTuple):
    """Of one image, after each of S reductions.

    Attributes:
        after_blocks: int32 `[S]`, from 1.
        source: int32 `[S, M]` which token stands for each patch, -1 where none does; two patches with the same number
            are one token (merging).
        tokens: int32 `[S]` tokens left, class token left out, fused ones (EViT) among them.
        fused: int32 `[S]` how many of these stand for no one patch.
    """

    after_blocks: np.ndarray
    source: np.ndarray
    tokens: np.ndarray
    fused: np.ndarray


def kept_tokens(trace: Trace, num_patches: int) -> KeptTokens:
    """Of the first image of a trace (numpy arrays)."""
    stages = trace.stages.values()
    left = [stage.survivors[0] for stage in stages]
    return KeptTokens(
        after_blocks=np.array(list(trace.stages), np.int32),
        source=np.array([stage.source[0] for stage in stages], np.int32).reshape(len(left), num_patches),
        tokens=np.array([np.sum(places != CLASS) for places in left], np.int32),
        fused=np.array([np.sum(places == FUSED) for places in left], np.int32),
    )


def kept_section(kept: KeptTokens, photo: Photo, *, merges: bool) -> Section:
    """The photo as the model sees it, then what is left of it."""
    num_patches = kept.source.shape[1] if kept.source.size else photo.grid[0] * photo.grid[1]
    panels = [
        Panel(f"input: {photo.grid[0]} x {photo.grid[1]} = {num_patches} tokens", functools.partial(_input, photo))
    ]
    for stage in range(len(kept.after_blocks)):
        draw = functools.partial(_stage, photo, kept.source[stage])
        panels.append(Panel(_caption(kept, stage, num_patches, merges), draw))
    if not len(kept.after_blocks):
        note = "This model is dense: every token goes through every block."
    elif merges:
        note = "Patches of one token have its mean colour and no line between them; a token may be in several pieces."
    else:
        note = "Patches in colour go on to the next blocks; grey ones were dropped. A line parts the two."
    return Section("Tokens that are left", note, [panels])


def _caption(kept: KeptTokens, stage: int, num_patches: int, merges: bool) -> str:
    tokens, fused, block = kept.tokens[stage], kept.fused[stage], kept.after_blocks[stage]
    if merges:
        return f"after block {block}: {num_patches} patches in {tokens} tokens"
    more = f", + {fused} fused of the rest" if fused else ""
    return f"after block {block}: {tokens - fused} of {num_patches} tokens kept{more}"


def _input(photo: Photo, axes: Axes) -> None:
    draw_photo(axes, photo)
    draw_grid(axes, photo)


def _stage(photo: Photo, source: np.ndarray, axes: Axes) -> None:
    draw_photo(axes, _merged(photo, source), dropped=source < 0)
    draw_grid(axes, photo)
    alone = np.bincount(source[source >= 0]).max(initial=0) <= 1
    draw_borders(axes, photo, source >= 0 if alone else source, colour=VERMILLION)


def _merged(photo: Photo, source: np.ndarray) -> Photo:
    """The photo with the patches of each token of several in their mean colour."""
    shares = np.bincount(source[source >= 0], minlength=1)
    if shares.max(initial=0) <= 1:
        return photo
    token = source[photo.places()]
    sums = np.stack([np.bincount(token.ravel(), photo.pixels[:, :, c].ravel()) for c in range(3)], -1)
    means = sums / np.maximum(np.bincount(token.ravel()), 1)[:, None]
    several = (shares > 1)[token]
    return photo._replace(pixels=np.where(several[:, :, None], means[token], photo.pixels).astype(np.uint8))


class ScoreMaps(NamedTuple):
    """Of one image, at each of S reductions.

    Attributes:
        after_blocks: int32 `[S]`, from 1.
        scores: float32 `[S, M]` score of the token at each patch, NaN where it was gone already. A fused token's
            (EViT) has no place and is not here.
        kept: bool `[S, M]` whether the patch's token stayed.
    """

    after_blocks: np.ndarray
    scores: np.ndarray
    kept: np.ndarray


def score_maps(trace: Trace, num_patches: int) -> ScoreMaps | None:
    """Of the first image of a trace (numpy arrays); None where nothing was ranked."""
    found = {block: stage for block, stage in trace.stages.items() if stage.scores is not None}
    if not found:
        return None
    scores = np.full((len(found), num_patches), np.nan, np.float32)
    for row, stage in zip(scores, found.values(), strict=True):
        places = stage.candidates[0]
        assert stage.scores is not None
        row[places[places >= 0]] = stage.scores[0][places >= 0]
    kept = np.stack([stage.source[0] >= 0 for stage in found.values()])
    return ScoreMaps(np.array(list(found), np.int32), scores, kept)


def scores_section(maps: ScoreMaps, photo: Photo, *, score: str) -> Section:
    """A map per reduction, each with a scale of its own.

    Args:
        maps: what is drawn.
        photo: whose cells are coloured.
        score: its name, as in `Pruning.score`.
    """
    panels = [
        Panel(f"'{score}' at the end of block {block}", functools.partial(_draw_scores, photo, scores, kept), "score")
        for block, scores, kept in zip(maps.after_blocks, maps.scores, maps.kept, strict=True)
    ]
    note = "Higher (brighter) stays. White lines part what was kept from what was dropped; hatched: dropped earlier."
    return Section("Scores that tokens were ranked by", note, [panels])


def _draw_scores(photo: Photo, scores: np.ndarray, kept: np.ndarray, axes: Axes) -> ScalarMappable:
    shown = draw_map(axes, photo, scores, float(np.nanmin(scores)), float(np.nanmax(scores)))
    draw_borders(axes, photo, kept, colour="white")
    return shown
