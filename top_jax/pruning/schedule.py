"""Where tokens are pruned and how many stay: Python ints, fixed before jit."""

from __future__ import annotations

import dataclasses
import math

from top_jax.errors import InputError
from top_jax.ops import check_alignment
from top_jax.pruning.score import SCORES

ORDERS = ("position", "score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """When, how many, which and how: the settings of token pruning. No `after_blocks` is the dense model.

    Attributes:
        after_blocks: 1-based, increasing: 5 prunes after the fifth block.
        keep_ratio: share of the patch tokens that stays at each prune, in (0, 1]: one number, or one per prune.
        score: what ranks the tokens: `clip` (the paper's), `noclip`, `l1`, `l2`, or a control: `random`, `uniform`.
        alignment: `none`, `hold` or `decay` (`top_jax.pruning`).
        order: `position` keeps the survivors in scan order; `score` leaves them best first, as EViT does, and is
            only for the baseline `alignment="none"`.
        seed: of the control `random`.

    Raises:
        InputError: a value outside these ranges.

    Source: ToP, arXiv 2409.18962, section 4.
    """

    after_blocks: tuple[int, ...] = ()
    keep_ratio: float | tuple[float, ...] = 1.0
    score: str = "clip"
    alignment: str = "hold"
    order: str = "position"
    seed: int = 0

    def __post_init__(self) -> None:
        blocks = self.after_blocks
        object.__setattr__(self, "after_blocks", (blocks,) if isinstance(blocks, int) else tuple(blocks))
        if isinstance(self.keep_ratio, list):
            object.__setattr__(self, "keep_ratio", tuple(self.keep_ratio))
        blocks = self.after_blocks
        if any(not isinstance(b, int) or b < 1 for b in blocks) or list(blocks) != sorted(set(blocks)):
            raise InputError(f"after_blocks={blocks}; needed: increasing block numbers from 1, such as (5, 10, 15).")
        if isinstance(self.keep_ratio, tuple) and len(self.keep_ratio) != len(blocks):
            raise InputError(
                f"keep_ratio has {len(self.keep_ratio)} numbers for {len(blocks)} prunes (after_blocks={blocks}); "
                "pass one number, or one per prune."
            )
        for ratio in self.ratios:
            if isinstance(ratio, (bool, str)) or ratio is None or not 0 < ratio <= 1:
                raise InputError(f"keep_ratio={ratio!r}; needed: a share in (0, 1], such as 0.8.")
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r} is unknown; choose one of {', '.join(SCORES)}.")
        check_alignment(self.alignment)
        if self.order not in ORDERS:
            raise InputError(f"order={self.order!r} is unknown; choose one of {', '.join(ORDERS)}.")
        if self.order == "score" and self.alignment != "none":
            raise InputError(
                f"order='score' with alignment={self.alignment!r}: an aligned scan needs its tokens in scan order; "
                "use order='position', or alignment='none' for the unaligned baseline."
            )

    @property
    def ratios(self) -> tuple[float, ...]:
        """One keep ratio per prune."""
        if isinstance(self.keep_ratio, tuple):
            return self.keep_ratio
        return (self.keep_ratio,) * len(self.after_blocks)

    def keep_counts(self, num_patches: int, depth: int) -> dict[int, int]:
        """Patch tokens left after each prune: {block: K'}, K' = ceil(round(keep_ratio * K, 6)).

        >>> Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8).keep_counts(196, depth=24)
        {5: 157, 10: 126, 15: 101}

        Raises:
            InputError: a prune at or after the last block, or one that leaves no token.
        """
        counts = {}
        for block, ratio in zip(self.after_blocks, self.ratios, strict=True):
            if block >= depth:
                raise InputError(
                    f"after_blocks={self.after_blocks} prunes after block {block} of {depth}: nothing would run on "
                    f"what is left; the last place to prune is after block {depth - 1}."
                )
            kept = math.ceil(round(ratio * num_patches, 6))
            if kept < 1:
                raise InputError(
                    f"keep_ratio={ratio} leaves none of {num_patches} tokens after block {block}; keep more."
                )
            counts[block] = num_patches = kept
        return counts
