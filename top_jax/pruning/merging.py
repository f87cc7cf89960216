"""Token merging (ToMe), as R-MeeTo adapted it to Mamba: merges similar tokens and keeps the scan's order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.pruning.reduction import Cut, Reduction
from top_jax.pruning.score import Evidence
from top_jax.pruning.tokens import Tokens
from top_jax.typing import Array, Embedded, Float, Int, Slots

HIGHEST = jax.lax.Precision.HIGHEST  # by default a GPU rounds the factors of float32 products to ten bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging(Reduction):
    """Bipartite merging of similar tokens: no patch is dropped, each remains part of some token.

    The patch tokens alternate between sources (1st, 3rd, ...) and targets (2nd, 4th, ...). Each source finds its most
    similar target, by the cosine of their hidden states x. The excess sources are merged, most similar first. A target
    becomes the mean of itself and its sources, weighted by the number of patches that each stands for, in x and in the
    residual stream. A target keeps its position, and the remaining tokens keep their order. Gradients flow through the
    means, not through the matching.

    `Tokens.size` counts the patches of each token (1 for the class token, which is never merged), and `Tokens.source`
    gives the token of each patch. Both are set by the first merge, which sees all patches, since a model has one
    reduction.

    Differences from R-MeeTo and ToMe:

    * The number of merged tokens follows from a share (`keep_ratio`); theirs is a constant.
    * A `keep_ratio` that would merge more than all sources at once is an error; they merge half of the tokens.
    * R-MeeTo moves the class token to int(position * (L - merged) / L). Ours stays between its neighbours or, with
      `alignment="none"`, moves to its position in an image with that many patches.
    * x is what a block adds to the residual stream in ViM, as in R-MeeTo, and the stream itself in PlainMamba and DeiT.
    * R-MeeTo has no alignment. Here the position of a token that was merged into another is a gap for `decay`.
    * The similarity of a token x = 0 is 0; theirs is NaN.
    * On DeiT, patches are split and compared as on Mamba. ToMe compares attention keys there, and counts the class
      token as the first source (which is never merged), so that the 2nd, 4th, ... patches are its sources.

    Attributes:
        after_blocks, keep_ratio, alignment: as in `Reduction`.

    Raises:
        InputError: a value out of range.

    Source: ToMe, arXiv 2210.09461, section 3 (facebookresearch/ToMe, tome/merge.py: `bipartite_soft_matching`,
        `merge_wavg`); R-MeeTo, arXiv 2412.12496 (NUS-HPC-AI-Lab/R-MeeTo, image_task/R_MeeTo/merge.py:
        `ordered_merge`, with cosine distance and metric "X").
    """

    def cut(self, block: int, before: int, ratio: float) -> Cut:
        """Returns one entry of the schedule.

        Raises:
            InputError: fewer tokens would be left than if every source is merged.
        """
        cut, least = super().cut(block, before, ratio), before // 2
        if cut.kept < least:
            raise InputError(
                f"keep_ratio={ratio} leaves {cut.kept} of {before} tokens, but one merge can only remove every other "
                f"token, which leaves {least}. Use keep_ratio=0.5 or more, and merge after more blocks."
            )
        return cut

    def __call__(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> Tokens:
        """Merges until `cut.after` patch tokens are left; returns the tokens unchanged if all of them stay."""
        count, keep = cut.before, cut.after
        if keep == count:
            return tokens
        if tokens.size is None:
            tokens = dataclasses.replace(tokens, size=jnp.ones(tokens.positions.shape, jnp.float32))
        slots = tokens.patch_slots()
        heirs = _heirs(jnp.take_along_axis(tokens.x, slots[:, :, None], axis=1), count - keep)
        stays = heirs == jnp.arange(count, dtype=jnp.int32)[None, :]
        order = jnp.argsort(jnp.logical_not(stays), axis=1, stable=True)
        kept, gone = order[:, :keep], order[:, keep:]  # both in scan order
        rank = jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1  # among the tokens that stay
        heirs = jnp.take_along_axis(rank, heirs, axis=1)

        # From indices among the patch tokens to slots along L, which the class token also has.
        kept_slots, gone_slots = (jnp.take_along_axis(slots, part, axis=1) for part in (kept, gone))
        after = tokens.keep(kept_slots, condensed=self.alignment == "none")
        others = dataclasses.replace(tokens, cls_index=None).keep(gone_slots, condensed=False)
        into = jnp.take_along_axis(after.patch_slots(), jnp.take_along_axis(heirs, gone, axis=1), axis=1)
        source = heirs if tokens.source is None else jnp.take_along_axis(heirs, tokens.source, axis=1)
        return dataclasses.replace(_absorbed(after, others, into), source=source)


def _heirs(x: Float[Array, "B K D"], count: int) -> Int[Array, "B K"]:
    """Returns, for each patch token, the token that represents it after `count` merges: itself or its target."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    direction = x / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    alike = jnp.einsum("bsd,btd->bst", direction[:, ::2], direction[:, 1::2], precision=HIGHEST)
    best_first = jnp.argsort(jnp.max(alike, axis=-1), axis=1, stable=True, descending=True)
    rank = jnp.argsort(best_first, axis=1)  # rank of each source
    target = 2 * jnp.argmax(alike, axis=-1).astype(jnp.int32) + 1
    rank, target = (jnp.repeat(of_pair, 2, axis=1)[:, : x.shape[1]] for of_pair in (rank, target))
    token = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where((token % 2 == 0) & (rank < count), target, token)


def _absorbed(tokens: Tokens, others: Tokens, into: Slots) -> Tokens:
    """Averages each of `tokens` with the `others` that go `into` its slot, in float32.

    Uses a product with a one-hot matrix, because a scatter adds in an undefined order.
    """
    assert tokens.size is not None and others.size is not None
    brought = jax.nn.one_hot(into, tokens.size.shape[1], dtype=jnp.float32) * others.size[:, :, None]
    size = tokens.size + jnp.sum(brought, axis=1)
    own, shares = tokens.size / size, brought / size[:, None, :]  # own is exactly 1 if nothing is added

    def mean(x: Embedded | None, other: Float[Array, "B K D"] | None) -> Embedded | None:
        if x is None or other is None:
            return None
        added = jnp.einsum("bkl,bkd->bld", shares, other.astype(jnp.float32), precision=HIGHEST)
        return (x.astype(jnp.float32) * own[:, :, None] + added).astype(x.dtype)

    x = mean(tokens.x, others.x)
    assert x is not None
    return dataclasses.replace(tokens, x=x, residual=mean(tokens.residual, others.residual), size=size)
