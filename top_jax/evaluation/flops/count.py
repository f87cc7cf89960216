"""Multiply-accumulates of a ViM, counted from its sizes and its pruning schedule.

Conventions (every number we print names one):

    published        matrix products, convolutions and 9 L E N per scan; *one* of the two scan directions; stem and
                     head in; biases, norms and activations out. What the papers print as "FLOPs".
    all_directions   the same with both directions.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from top_jax.models import VimConfig
from top_jax.pruning import Pruning

CONVENTIONS: Final = {"published": 1, "all_directions": 2}  # scan directions counted


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        tokens_per_block: tokens each block runs on, class token included.
        macs: multiply-accumulates by convention.
    """

    tokens_per_block: tuple[int, ...]
    macs: dict[str, int]

    def gmacs(self, convention: str) -> float:
        """Billions of multiply-accumulates."""
        return self.macs[convention] / 1e9


def count_macs(config: VimConfig, pruning: Pruning | None = None) -> Cost:
    """Counts one image's multiply-accumulates; `pruning=None` is the dense model."""
    counts = (pruning or Pruning()).keep_counts(config.num_patches, config.depth)
    patches, tokens = config.num_patches, []
    for block in range(1, config.depth + 1):
        tokens.append(patches + 1)
        patches = counts.get(block, patches)
    stem = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    head = config.embed_dim * config.num_classes
    macs = {
        name: stem + head + sum(tokens) * _block_macs_per_token(config, directions)
        for name, directions in CONVENTIONS.items()
    }
    return Cost(tuple(tokens), macs)


def _block_macs_per_token(config: VimConfig, directions: int) -> int:
    inner, states, rank = config.inner_dim, config.d_state, config.dt_rank
    projections = config.embed_dim * 2 * inner + inner * config.embed_dim
    direction = inner * config.d_conv + inner * (rank + 2 * states) + rank * inner + 9 * inner * states
    return projections + directions * direction
