"""What every backbone does: embed, run the blocks and reduce tokens after some of them, norm, classify."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.errors import InputError
from top_jax.models.batch_norm import moves_statistics
from top_jax.models.features import Features, make_features
from top_jax.models.sizes import BackboneConfig, MambaConfig
from top_jax.models.weights import Weights, statistics_of
from top_jax.ops import ScanArguments, ScanPlan
from top_jax.ops.implementations import resolve
from top_jax.pruning import Evidence, Pruning, Reduction, Tokens
from top_jax.typing import Array, Embedded, Float, Images, Logits


class BlockRun(NamedTuple):
    """One block of a forward pass, for those who look inside (`Backbone.features`, `watch`).

    Attributes:
        number: 1-based.
        block: itself.
        entering: its tokens.
        paths: what `Backbone.paths` gave for them.
        mixed: the tokens after its mixing half, the candidates of the reduction where there is one.
        evidence: what it tells about them.
        leaving: the tokens after it, reduced where there is a reduction.
    """

    number: int
    block: Block
    entering: Tokens
    paths: Any
    mixed: Tokens
    evidence: Evidence
    leaving: Tokens


class Block(nnx.Module, abc.ABC):
    """One block of a backbone, in the two halves between which tokens may be reduced."""

    @abc.abstractmethod
    def mix(self, tokens: Tokens, paths: Any, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """The half in which tokens see each other; with it goes what scores need, reduced to `[B, L]` each.

        Args:
            tokens: of this stage.
            paths: what `Backbone.paths` gave for them.
            keys: `[B]`, as in `Backbone.__call__`.
        """

    def transform(self, tokens: Tokens, keys: jax.Array | None) -> Tokens:
        """The half that acts on each token by itself (DeiT's MLP); a Mamba block has none."""
        return tokens

    def scan_arguments(self, tokens: Tokens, paths: Any) -> tuple[ScanArguments, ScanPlan] | None:
        """The arguments of the scans in `mix` (eval mode), and their plan; None for a block without a scan."""
        return None


class Backbone(nnx.Module, abc.ABC):
    """A classifier; the dense model is the one with the empty reduction schedule.

    A family sets `EVIDENCE`, `blocks` and `head`, and implements `embed`, `normalised` and `pool`; `paths`, where its
    scans need to be told where tokens are; and `stream`, where x is not the residual stream.
    """

    EVIDENCE: ClassVar[tuple[str, ...]]
    """What its blocks tell about their tokens."""

    config: Any  # the family's own; a BackboneConfig
    blocks: nnx.List[Block]
    head: nnx.Linear

    def __init__(self, config: BackboneConfig, pruning: Reduction | None):
        self.config = config
        if not isinstance(pruning, Reduction | None):
            raise InputError(
                f"pruning={pruning!r} is no reduction; pass top_jax.Pruning(...), Evit(...), Merging(...), or None."
            )
        self.reduction = Pruning() if pruning is None else pruning
        if self.reduction.alignment == "decay" and not isinstance(config, MambaConfig):
            raise InputError("alignment='decay' is of a scan, and this model has none; use 'hold' or 'none'.")
        self.reduction.check_evidence(self.EVIDENCE)
        self.schedule = self.reduction.schedule(config.num_patches, config.depth)

    @property
    def scan_implementation(self) -> str | None:
        """The implementation that its scans run on this machine's default device; None for a model without scans.

        Raises:
            InputError: an unknown implementation, or one that cannot run here.
        """
        return resolve(self.config.implementation) if isinstance(self.config, MambaConfig) else None

    def __call__(self, images: Images, keys: jax.Array | None = None) -> Logits:
        """Classifies images.

        Args:
            images: float32 `[B, H, W, 3]`, normalised.
            keys: `[B]` PRNG keys, one per image: needed in train mode with drop_path > 0.

        Returns:
            float32 logits `[B, num_classes]`.

        Raises:
            InputError: images of another size than the model's.
        """
        return self.classify(self.features(images, keys))

    def classify(self, features: Features) -> Logits:
        """Logits of `features`."""
        return self.head(self.pool(features).astype(self.config.dtype)).astype(jnp.float32)

    def features(
        self,
        images: Images,
        keys: jax.Array | None = None,
        *,
        stages: tuple[int, ...] = (),
        watch: Callable[[BlockRun], None] | None = None,
    ) -> Features:
        """Final tokens of images, after the final norm.

        Args:
            images: as of `__call__`.
            keys: as of `__call__`.
            stages: 1-based blocks after which the tokens are wanted too: `Features.stages` holds the stream that
                leaves each (after its reduction, where there is one), without a norm.
            watch: called with what happened in each block, once it ran (under jit, with tracers).

        Raises:
            InputError: images of another size than the model's, or a block that is not there.
        """
        self._check(images, keys, stages)
        tokens = self.embed(images)
        paths = self.paths(tokens)
        cuts = {cut.block: cut for cut in self.schedule}
        wanted = {}
        for number, block in enumerate(self.blocks, start=1):
            entering, its_paths = tokens, paths
            tokens, evidence = self._run(_mix, block, tokens, paths, keys)
            mixed = tokens
            if number in cuts:
                tokens = self.reduction(tokens, evidence, cuts[number])
                paths = self.paths(tokens)
            tokens = self._run(_transform, block, tokens, keys)
            if watch is not None:
                watch(BlockRun(number, block, entering, its_paths, mixed, evidence, tokens))
            if number in stages:
                wanted[number] = self._as_features(tokens, self.stream(tokens))
        features = self._as_features(tokens, self.normalised(tokens, keys))
        return dataclasses.replace(features, stages=tuple(wanted[number] for number in stages))

    @abc.abstractmethod
    def embed(self, images: Images) -> Tokens:
        """The tokens that enter the first block."""

    def paths(self, tokens: Tokens) -> Any:
        """What the scans of one stage share: the way they take through these tokens, where they need one."""
        return None

    def stream(self, tokens: Tokens) -> Embedded:
        """float32 `[B, L, D]` residual stream after a block."""
        return tokens.x

    @abc.abstractmethod
    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """float32 `[B, L, D]` after the final norm."""

    @abc.abstractmethod
    def pool(self, features: Features) -> Float[Array, "B D"]:
        """The vector that the head reads."""

    def _run(self, half: Callable[..., Any], block: Block, *arguments: Any) -> Any:
        return _recomputed(half, block, *arguments) if self.config.remat else half(block, *arguments)

    def _as_features(self, tokens: Tokens, x: Embedded) -> Features:
        return make_features(dataclasses.replace(tokens, x=x, residual=None), self.config.grid)

    def _check(self, images: Images, keys: jax.Array | None, stages: tuple[int, ...]) -> None:
        height, width = self.config.img_size
        if images.shape[1:] != (height, width, 3):
            raise InputError(
                f"images have shape {images.shape}; this model needs [B, {height}, {width}, 3]: a batch axis first, "
                "channels last, and the img_size of the model."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images have dtype {images.dtype}; needed: floats, normalised as top_jax.preprocess does it."
            )
        if keys is not None and keys.shape[:1] != images.shape[:1]:
            raise InputError(f"{keys.shape} keys for {len(images)} images; pass one key per image.")
        if any(not 1 <= stage <= self.config.depth for stage in stages):
            raise InputError(f"stages={stages}; this model has the blocks 1 to {self.config.depth}.")


def _recomputed(half: Callable[..., Any], block: Block, *arguments: Any) -> Any:
    """`half(block, *arguments)`, computed once more in the backward pass instead of keeping what is between.

    Not nnx.remat, which writes every weight back into the block and so refuses a model that a compiled function closes
    over. Here BatchNorm's statistics alone go back, and in train mode alone.
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


def _mix(block: Block, tokens: Tokens, paths: Any, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
    return block.mix(tokens, paths, keys)


def _transform(block: Block, tokens: Tokens, keys: jax.Array | None) -> Tokens:
    return block.transform(tokens, keys)
