"""Runs the blocks of a train step: equal blocks as one loop, with few values stored for the backward pass.

A loop compiles one block instead of all. For the backward pass a block stores its matrix products and what its scans
need; it recomputes the rest, which is cheap: norms, ViM's convolutions, activations and gates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.models.layers import DropPath, moves_statistics
from top_jax.models.weights import KINDS, Weights, statistics_of
from top_jax.ops.directions import KEPT_OF_A_SCAN
from top_jax.pruning import Tokens

SHORTEST = 3
"""Fewest equal blocks that run as a loop."""

_PRODUCTS_AND_SCANS: Final = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(KEPT_OF_A_SCAN)
)


def is_training(block: nnx.Module) -> bool:
    """Returns whether a block is in train mode, according to its drop-paths."""
    return any(not part.deterministic for part in _drop_paths(block))


def one_by_one(numbers: range) -> list[range]:
    """Returns a range for each number, for blocks that run without a loop."""
    return [range(number, number + 1) for number in numbers]


def groups(blocks: Sequence[nnx.Module], alone: Collection[int], last: Collection[int]) -> list[range]:
    """Divides blocks into ranges of 1-based numbers: equal neighbours that can run as one loop, or single blocks.

    Args:
        blocks: all blocks of the model, in order.
        alone: numbers of blocks that stay outside of loops.
        last: numbers of blocks after which a loop ends.
    """
    found: list[range] = []
    structures = [_structure(block) for block in blocks]
    for number, structure in enumerate(structures, start=1):
        before = number - 1
        joins = found and not {before, number} & set(alone) and before not in last
        if joins and structures[before - 1] == structure:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return [part for group in found for part in ([group] if len(group) >= SHORTEST else one_by_one(group))]


def run_loop(
    run: Callable[[Any, Tokens], Tokens], blocks: Sequence[nnx.Module], tokens: Tokens, *, remat: bool
) -> Tokens:
    """Returns the tokens after `blocks`, which have equal structure; updated statistics are written back into them.

    The blocks' weights are stacked, and so are the rates and indices of their drop-paths.

    Args:
        run: maps a block and the tokens that enter it to the tokens that leave it.
        blocks: one of the `groups`.
        tokens: the tokens that enter the first block.
        remat: store nothing of a block for the backward pass, not even its matrix products and what its scans need.
    """
    graphdef = nnx.graphdef(blocks[0])
    weights = _stacked([nnx.to_pure_dict(nnx.state(block, nnx.Param)) for block in blocks])
    statistics = _stack([statistics_of(block) for block in blocks])
    drop_paths = [_drop_paths(block) for block in blocks]
    rates = jnp.asarray([[part.rate for part in parts] for parts in drop_paths], float)  # in JAX's default float type
    indices = jnp.asarray([[part.index for part in parts] for parts in drop_paths], jnp.int32)
    drops = any(part.rate for parts in drop_paths for part in parts)

    def body(tokens: Tokens, its: tuple[Weights, Weights, jax.Array, jax.Array]) -> tuple[Tokens, Weights]:
        weights, statistics, rates, indices = its
        block = nnx.merge(graphdef, weights, statistics)
        if drops:
            for place, part in enumerate(_drop_paths(block)):
                part.rate, part.index = nnx.data(rates[place]), nnx.data(indices[place])
        return run(block, tokens), statistics_of(block)

    keep = None if remat else _PRODUCTS_AND_SCANS
    body = jax.checkpoint(body, policy=keep, prevent_cse=False)  # a loop already separates the two passes
    tokens, statistics = jax.lax.scan(body, tokens, (weights, statistics, rates, indices))
    for place, block in enumerate(blocks):
        if moves_statistics(block):
            nnx.update(block, jax.tree.map(lambda leaf, place=place: leaf[place], statistics))
    return tokens


def recomputed(half: Callable[..., Any], block: nnx.Module, *arguments: Any) -> Any:
    """Returns `half(block, *arguments)`, recomputed in the backward pass instead of storing its activations.

    nnx.remat writes every weight back into the block, so it refuses a model that a compiled function closes over. Here
    only BatchNorm's statistics are written back, and only in train mode.
    """
    graphdef, state = nnx.split(block)

    def pure(weights: Weights, *arguments: Any) -> Any:
        again = nnx.merge(graphdef, weights)
        result = half(again, *arguments)
        return result, statistics_of(again)

    result, statistics = jax.checkpoint(pure)(nnx.to_pure_dict(state), *arguments)
    if moves_statistics(block):
        nnx.update(block, statistics)
    return result


def _stack(blocks: Sequence[Weights]) -> Weights:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


@jax.custom_vjp
def _stacked(blocks: list[Weights]) -> Weights:
    """Stacks the weights of equal blocks; its gradient compiles fast."""
    return _stack(blocks)


def _forward(blocks: list[Weights]) -> tuple[Weights, None]:
    return _stack(blocks), None


def _backward(_: None, grads: Weights) -> tuple[list[Weights]]:
    """Takes the blocks' gradients out of the stacked ones, at indices that XLA does not know in advance.

    XLA compiles equal operations once. Slices at constant indices would all differ, and so would the optimizer's
    updates that they are fused into. XLA neither computes a sort in advance nor fuses it.
    """
    count = len(jax.tree.leaves(grads)[0])
    numbers = [jnp.full((2,), number, jnp.int32) for number in range(count)]
    places = jax.lax.sort((jnp.arange(2, dtype=jnp.int32), *numbers), num_keys=1)[1:]

    def take(place: jax.Array) -> Weights:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), grads)

    return ([take(place[0]) for place in places],)


_stacked.defvjp(_forward, _backward)


def _drop_paths(block: nnx.Module) -> list[DropPath]:
    return [part for _, part in nnx.iter_modules(block) if isinstance(part, DropPath)]


def _structure(block: nnx.Module) -> Any:
    """Returns a value that is equal for blocks that compute the same from their weights, except for drop-paths."""
    graphdef, state = nnx.split(block)
    modules = {type(part).__module__.partition(".")[0] for _, part in nnx.iter_modules(block)}
    if not modules <= {"top_jax", "flax"} or nnx.state(block, nnx.Not(nnx.Any(*KINDS))):
        return object()  # equal to no other block: a user's class may count its calls, or store what it computes
    copy = nnx.merge(graphdef, state)
    for part in _drop_paths(copy):
        part.rate, part.index = 0.0, 0
    return nnx.graphdef(copy), jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
