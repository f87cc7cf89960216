"""Which patches remain after each reduction, drawn on the photo, and the scores that tokens were ranked by."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from top_jax.evaluation.trace import CLASS, FUSED, Trace
from top_jax.figures.page import VERMILLION, Panel, Section, draw_borders, draw_grid, draw_map, draw_photo
from top_jax.figures.photo import Photo
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable


class KeptTokens(NamedTuple):
    """The tokens of one image after each of its S reductions.

    Attributes:
        after_blocks: int32 `[S]`, the number of the block before each reduction, counted from 1.
        source: int32 `[S, M]`, the index of the token that represents each patch, -1 for a dropped patch. Merged
            patches share an index.
        tokens: int32 `[S]`, the number of remaining tokens, with fused ones (EViT) and without the class token.
        fused: int32 `[S]`, how many of them are fused tokens.
    """

    after_blocks: np.ndarray
    source: np.ndarray
    tokens: np.ndarray
    fused: np.ndarray


def kept_tokens(trace: Trace, num_patches: int) -> KeptTokens:
    """Returns the kept tokens of the first image of a trace (numpy arrays), which has M = `num_patches`."""
    stages = trace.stages.values()
    left = [stage.survivors[0] for stage in stages]
    return KeptTokens(
        after_blocks=np.array(list(trace.stages), np.int32),
        source=np.array([stage.source[0] for stage in stages], np.int32).reshape(len(left), num_patches),
        tokens=np.array([np.sum(places != CLASS) for places in left], np.int32),
        fused=np.array([np.sum(places == FUSED) for places in left], np.int32),
    )


def kept_section(kept: KeptTokens, photo: Photo, *, merges: bool) -> Section:
    """Returns a panel with the model's input, and one with the remaining tokens after each reduction.

    Args:
        kept: what is drawn.
        photo: the photo to draw on.
        merges: whether tokens were merged, not dropped.
    """
    num_patches = kept.source.shape[1] if kept.source.size else photo.grid[0] * photo.grid[1]
    panels = [
        Panel(f"input: {photo.grid[0]} x {photo.grid[1]} = {num_patches} tokens", functools.partial(_input, photo))
    ]
    for stage in range(len(kept.after_blocks)):
        draw = functools.partial(_stage, photo, kept.source[stage])
        panels.append(Panel(_caption(kept, stage, num_patches, merges), draw))
    if not len(kept.after_blocks):
        note = "This model is dense: every token passes through every block."
    elif merges:
        note = "Merged patches have their mean colour and no line between them; a token may consist of several pieces."
    else:
        note = "Patches in colour are kept, grey ones were dropped. Lines separate kept and dropped patches."
    return Section("Remaining tokens", note, [panels])


def _caption(kept: KeptTokens, stage: int, num_patches: int, merges: bool) -> str:
    tokens, fused, block = kept.tokens[stage], kept.fused[stage], kept.after_blocks[stage]
    if merges:
        return f"after block {block}: {num_patches} patches in {tokens} tokens"
    more = f", the rest fused into {fused}" if fused else ""
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
    """Returns the photo with merged patches in their mean colour."""
    shares = np.bincount(source[source >= 0], minlength=1)
    if shares.max(initial=0) <= 1:
        return photo
    token = source[photo.places()]
    sums = np.stack([np.bincount(token.ravel(), photo.pixels[:, :, c].ravel()) for c in range(3)], -1)
    means = sums / np.maximum(np.bincount(token.ravel()), 1)[:, None]
    several = (shares > 1)[token]
    return photo._replace(pixels=np.where(several[:, :, None], means[token], photo.pixels).astype(np.uint8))


class ScoreMaps(NamedTuple):
    """The scores of one image's tokens at each of its S reductions.

    Attributes:
        after_blocks: int32 `[S]`, the number of the block before each reduction, counted from 1.
        scores: float32 `[S, M]`, the score of the token at each patch, NaN if it was dropped earlier. The scores of
            fused tokens (EViT), which have no place on the image, are left out.
        kept: bool `[S, M]`, whether the patch's token was kept.
    """

    after_blocks: np.ndarray
    scores: np.ndarray
    kept: np.ndarray


def score_maps(trace: Trace, num_patches: int) -> ScoreMaps | None:
    """Returns the scores of the first image of a trace (numpy arrays), or None if no reduction ranked tokens."""
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
    """Returns one map per reduction, each with a colour scale of its own.

    Args:
        maps: what is drawn.
        photo: the photo whose cells are coloured.
        score: the name of the score, as in `Pruning.score`.
    """
    panels = [
        Panel(f"'{score}' at the end of block {block}", functools.partial(_draw_scores, photo, scores, kept), "score")
        for block, scores, kept in zip(maps.after_blocks, maps.scores, maps.kept, strict=True)
    ]
    note = (
        "Tokens with the highest (brightest) scores are kept. White lines separate kept and dropped patches. Hatched: "
        "patches that were dropped earlier."
    )
    return Section("Scores of the tokens", note, [panels])


def _draw_scores(photo: Photo, scores: np.ndarray, kept: np.ndarray, axes: Axes) -> ScalarMappable:
    shown = draw_map(axes, photo, scores, float(np.nanmin(scores)), float(np.nanmax(scores)))
    draw_borders(axes, photo, kept, colour="white")
    return shown
