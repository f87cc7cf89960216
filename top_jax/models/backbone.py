"""The forward pass that all backbones share: embed, blocks with token reduction after some of them, norm, head."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from top_jax.errors import InputError
from top_jax.models import initializers as init
from top_jax.models.block_loop import groups, is_training, one_by_one, recomputed, run_loop
from top_jax.models.features import Features, make_features, painted
from top_jax.models.sizes import BackboneConfig, MambaConfig
from top_jax.ops import ScanArguments, ScanPlan
from top_jax.ops.checks import is_array
from top_jax.ops.implementations import resolve
from top_jax.pruning import Cut, Evidence, Pruning, Reduction, Tokens
from top_jax.typing import Array, Embedded, Float, Images, Logits
from top_jax.values import refused, several, whole

_NO_TRACE = get_opaque_trace_state(convention="nnx")  # outside of JAX transformations


class BlockRun(NamedTuple):
    """Record of one block of a forward pass; passed to the `watch` function of `Backbone.features`.

    Attributes:
        number: 1-based number of the block.
        block: the block.
        entering: tokens that enter it.
        paths: what `Backbone.paths` returned for them.
        mixed: tokens after its mixing half; the candidates of the reduction if there is one.
        evidence: the block's evidence about them, for token scores.
        leaving: tokens that leave it, after the reduction if there is one.
    """

    number: int
    block: Block
    entering: Tokens
    paths: Any
    mixed: Tokens
    evidence: Evidence
    leaving: Tokens


class Block(nnx.Module, abc.ABC):
    """One block of a backbone. It has two halves; tokens may be reduced between them."""

    @abc.abstractmethod
    def mix(self, tokens: Tokens, paths: Any, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
        """Runs the half that mixes tokens: the scans, or the attention.

        Args:
            tokens: tokens of this stage.
            paths: what `Backbone.paths` returned for them.
            keys: `[B]`, as in `Backbone.__call__`.

        Returns:
            The mixed tokens, and the evidence for token scores: float32 `[B, L]` arrays by name.
        """

    def transform(self, tokens: Tokens, keys: jax.Array | None) -> Tokens:
        """Runs the half that acts on each token separately (DeiT's MLP); a Mamba block has none."""
        return tokens

    def scan_arguments(self, tokens: Tokens, paths: Any) -> tuple[ScanArguments, ScanPlan] | None:
        """Returns the arguments of the scans in `mix` (eval mode), and their plan; None for a block without a scan."""
        return None


class Backbone(nnx.Module, abc.ABC):
    """A classifier; the dense model is the one whose reduction schedule is empty.

    A family sets `EVIDENCE`, `blocks` and `head`, and implements `embed`, `normalised` and `pool`. It overrides `paths`
    if its scans depend on the tokens' positions, and `stream` if x is not the residual stream.

    Attributes:
        config: the family's `BackboneConfig`.
        reduction: how tokens are reduced; `Pruning()` without blocks for the dense model.
        schedule: what the reduction cuts after which block, for this model's depth and image size.
        blocks: the blocks, in order.
        head: the classifier; None for a model of 0 classes, which returns pooled features instead of logits.
    """

    EVIDENCE: ClassVar[tuple[str, ...]]
    """Names of its blocks' evidence about their tokens (`top_jax.pruning.Evidence`)."""
    ANY_SIZE: ClassVar[bool] = False
    """Whether it takes images of any size, or only those of its `img_size`."""

    config: Any  # a BackboneConfig; each family has its own
    blocks: nnx.List[Block]
    norm: Any  # the final norm
    pos_embed: nnx.Param[Any]
    head: nnx.Linear | None

    def __init__(self, config: BackboneConfig, pruning: Reduction | None):
        self.config = config
        if not isinstance(pruning, Reduction | None):
            raise refused("pruning", pruning, "top_jax.Pruning(...), Evit(...), Merging(...), or None")
        self.reduction = Pruning() if pruning is None else pruning
        if self.reduction.alignment == "decay" and not isinstance(config, MambaConfig):
            raise InputError("alignment='decay' needs a scan, and this model has none; use 'hold' or 'none'.")
        self.reduction.check_evidence(self.EVIDENCE)
        self.schedule = self.reduction.schedule(config.num_patches, config.depth)

    @property
    def scan_implementation(self) -> str | None:
        """Implementation of the scans on this machine's default device; None for a model without scans.

        Raises:
            InputError: an unknown implementation, or one that cannot run here.
        """
        return resolve(self.config.implementation) if isinstance(self.config, MambaConfig) else None

    @property
    def is_abstract(self) -> bool:
        """Whether the model has only the shapes of its weights (`abstract_model`)."""
        return isinstance(self.pos_embed.get_value(), jax.ShapeDtypeStruct)

    @property
    def num_features(self) -> int:
        """D, width of the pooled features that the head reads."""
        return self.config.embed_dim

    def reset_classifier(self, num_classes: int, rngs: nnx.Rngs | None = None) -> None:
        """Replaces the head, in place, by one with random weights; the other weights stay.

        Args:
            num_classes: width of the new logits; 0 removes the head, so that a call returns the pooled features.
            rngs: source of the new weights, `nnx.Rngs(0)` by default.

        Raises:
            InputError: an invalid number of classes or rngs.
        """
        config = dataclasses.replace(self.config, num_classes=whole("num_classes", num_classes, 0))
        head = make_head(config, checked_rngs(rngs))
        self.config, self.head = config, nnx.data(head)

    def __call__(self, images: Images, keys: jax.Array | None = None) -> Logits:
        """Classifies images. Outside of a JAX transformation the call is compiled once per set of shapes and settings.

        Args:
            images: float32 `[B, H, W, 3]`, normalised.
            keys: `[B]` PRNG keys, one per image; needed in train mode with drop_path > 0.

        Returns:
            float32 logits `[B, num_classes]`; the pooled features `[B, D]` for a model of 0 classes.

        Raises:
            InputError: the images do not have the model's size.
        """
        if is_traced():
            return self.classify(self.features(images, keys))
        self.check(images, keys, (), None)
        return call_compiled(Backbone.__call__, self, images, keys)

    def classify(self, features: Features) -> Logits:
        """Returns float32 logits `[B, num_classes]`, or pooled features, for the result of `features`."""
        pooled = self.pool(features)
        if self.head is None:
            return pooled.astype(jnp.float32)
        return self.head(pooled.astype(self.config.dtype)).astype(jnp.float32)

    def features(
        self,
        images: Images,
        keys: jax.Array | None = None,
        *,
        stages: tuple[int, ...] = (),
        watch: Callable[[BlockRun], None] | None = None,
    ) -> Features:
        """Returns the tokens after the final norm. It is compiled as `__call__` is.

        Args:
            images: as in `__call__`.
            keys: as in `__call__`.
            stages: 1-based numbers of blocks. `Features.stages` holds the residual stream after each of them (and after
                its reduction, if there is one), without a norm.
                A `DenseVim` returns its variant's maps instead.
            watch: called with a `BlockRun` for each block, in order. Inside a JAX transformation, it is called after
                the block, with tracers; otherwise after the last block.

        Raises:
            InputError: the images do not have the model's size, `stages` names a block that does not exist, or
                another argument is of the wrong type.
        """
        stages = self.check(images, keys, stages, watch)
        if is_traced():
            return self._features(images, keys, stages, watch)
        features, runs = call_compiled(_watched, self, images, keys, stages, watch is not None)
        if watch is not None:
            for number, (block, run) in enumerate(zip(self.blocks, runs, strict=True), start=1):
                watch(run._replace(number=number, block=block))
        return features

    def _features(
        self,
        images: Images,
        keys: jax.Array | None,
        stages: tuple[int, ...],
        watch: Callable[[BlockRun], None] | None,
    ) -> Features:
        """Computes `features` for checked arguments."""
        tokens = self.embed(images)
        paths = self.paths(tokens)
        cuts = {cut.block: cut for cut in self._schedule_of(tokens)}
        wanted, canvas = {}, None
        for numbers in self._groups(cuts, stages, watch):
            number, block = numbers[-1], self.blocks[numbers[-1] - 1]
            if len(numbers) > 1:
                whole = functools.partial(self._whole, paths=paths, keys=keys)
                tokens = run_loop(whole, self.blocks[numbers[0] - 1 : number], tokens, remat=self.config.remat)
            else:
                tokens = self.before_block(tokens)
                entering, its_paths = tokens, paths
                tokens, evidence = self._run(_mix, block, tokens, paths, keys)
                mixed = tokens
                if number in cuts:
                    if cuts[number].kept < cuts[number].before:
                        canvas = painted(self._as_features(tokens, self.map_value(tokens, number, keys), canvas))
                    tokens = self.reduction(tokens, evidence, cuts[number])
                    paths = self.paths(tokens)
                tokens = self._run(_transform, block, tokens, keys)
                if watch is not None:
                    watch(BlockRun(number, block, entering, its_paths, mixed, evidence, tokens))
            if number in stages:
                wanted[number] = self._as_features(tokens, self.map_value(tokens, number, keys), canvas)
        normed = None if canvas is None else self.norm(canvas)
        features = self._as_features(tokens, self.normalised(tokens, keys), normed)
        return dataclasses.replace(features, stages=tuple(wanted[number] for number in stages))

    @abc.abstractmethod
    def embed(self, images: Images) -> Tokens:
        """Returns the tokens that enter the first block."""

    def paths(self, tokens: Tokens) -> Any:
        """Returns the arrays that the scans of one stage share, such as the order of their visits, or None."""
        return None

    def before_block(self, tokens: Tokens) -> Tokens:
        """Returns the tokens that enter the next block; a family may change those that leave the previous one."""
        return tokens

    def map_value(self, tokens: Tokens, number: int, keys: jax.Array | None) -> Embedded:
        """Returns the value of `Features.stages` for the tokens that leave block `number`, float32 `[B, L, D]`."""
        return self.stream(tokens)

    def stream(self, tokens: Tokens) -> Embedded:
        """Returns the residual stream after a block, float32 `[B, L, D]`."""
        return tokens.x

    @abc.abstractmethod
    def normalised(self, tokens: Tokens, keys: jax.Array | None) -> Embedded:
        """Applies the final norm; returns float32 `[B, L, D]`."""

    @abc.abstractmethod
    def pool(self, features: Features) -> Float[Array, "B D"]:
        """Returns the vector that the head reads."""

    def _groups(
        self, cuts: dict[int, Cut], stages: tuple[int, ...], watch: Callable[[BlockRun], None] | None
    ) -> list[range]:
        """Returns which blocks run as one loop, by their numbers: in train mode, equal ones between two reductions."""
        if watch is not None or not is_training(self.blocks[0]):
            return one_by_one(range(1, len(self.blocks) + 1))
        return groups(self.blocks, alone=cuts, last=stages)

    def _whole(self, block: Block, tokens: Tokens, *, paths: Any, keys: jax.Array | None) -> Tokens:
        tokens, _ = block.mix(self.before_block(tokens), paths, keys)
        return block.transform(tokens, keys)

    def _run(self, half: Callable[..., Any], block: Block, *arguments: Any) -> Any:
        return recomputed(half, block, *arguments) if self.config.remat else half(block, *arguments)

    def _schedule_of(self, tokens: Tokens) -> tuple[Cut, ...]:
        rows, columns = tokens.grid or self.config.grid
        if (rows, columns) == self.config.grid:
            return self.schedule
        return self.reduction.schedule(rows * columns, self.config.depth)

    def _as_features(self, tokens: Tokens, x: Embedded, canvas: Float[Array, "B M D"] | None) -> Features:
        tokens = dataclasses.replace(tokens, x=x, residual=None)
        return make_features(tokens, tokens.grid or self.config.grid, canvas, whole=canvas is None)

    def check(self, images: Any, keys: Any, stages: Any, watch: Any) -> tuple[int, ...]:
        """Checks the arguments of `features` by their types and shapes; returns `stages` as ints."""
        height, width = ("H", "W") if self.ANY_SIZE else self.config.img_size
        if not is_array(images):
            raise refused("images", images, f"a JAX or NumPy array, float32[B, {height}, {width}, 3]")
        fits = images.ndim == 4 and images.shape[3] == 3 and 0 not in images.shape[1:3]
        if not fits or not self.ANY_SIZE and images.shape[1:3] != (height, width):
            raise InputError(
                f"images have shape {images.shape}; this model needs [B, {height}, {width}, 3]: a batch axis first, "
                f"channels last{'' if self.ANY_SIZE else ', and the img_size of the model'}."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images have dtype {images.dtype}; needed: floats, normalised as top_jax.preprocess does."
            )
        if images.shape[0] == 0:
            raise InputError(f"images have shape {images.shape}: an empty batch; pass at least one image.")
        if keys is not None:
            if not is_array(keys) or not _are_keys(keys):
                raise refused("keys", keys, "one PRNG key per image, such as jax.random.split(jax.random.key(0), B)")
            if keys.shape[:1] != images.shape[:1]:
                raise InputError(f"keys have shape {keys.shape} for {len(images)} images; pass one key per image.")
        if watch is not None and not callable(watch):
            raise refused("watch", watch, "a function of a BlockRun, or None")
        if self.is_abstract:
            raise InputError(
                "this model has only the shapes of its weights (abstract_model); fill it first, or use create_model."
            )
        needed = f"block numbers from 1 to {self.config.depth}, such as ({self.config.depth},)"
        try:
            return tuple(whole("stage", stage, 1, self.config.depth) for stage in several("stages", stages, needed))
        except InputError:
            raise refused("stages", stages, needed) from None


def make_head(config: BackboneConfig, rngs: nnx.Rngs) -> nnx.Linear | None:
    """Returns a classifier of pooled features, initialised as in all official models; None for 0 classes."""
    if not config.num_classes:
        return None
    return nnx.Linear(
        config.embed_dim, config.num_classes, dtype=config.dtype, kernel_init=init.trunc_normal, rngs=rngs
    )


def checked_rngs(rngs: nnx.Rngs | None) -> nnx.Rngs:
    """Returns the source of initial weights; `nnx.Rngs(0)` for None.

    Raises:
        InputError: it is not an `nnx.Rngs`, or has no stream for parameters.
    """
    if rngs is None:
        return nnx.Rngs(0)
    if not isinstance(rngs, nnx.Rngs) or not hasattr(rngs, "default") and not hasattr(rngs, "params"):
        needed = "flax.nnx.Rngs with a default or params stream, such as nnx.Rngs(0) or nnx.Rngs(key)"
        raise refused("rngs", rngs, needed)
    return rngs


def is_traced() -> bool:
    """Returns whether a call is part of a JAX transformation; also true while `jax.disable_jit` is on."""
    return get_opaque_trace_state(convention="nnx") != _NO_TRACE or bool(jax.config.jax_disable_jit)  # pyright: ignore


def call_compiled(
    function: Callable[..., Any], model: nnx.Module, images: Images, keys: jax.Array | None, *options: Any
) -> Any:
    """Returns `function(model, images, keys, *options)`, compiled; uncompiled it takes up to 70 times as long.

    The weights are arguments, so models of the same settings share a program, which keeps no model alive. Changes of
    the model's variables, such as BatchNorm's statistics, are written back.
    """
    result, moved = _compiled(function, options, model, images, keys)
    if moved:
        nnx.update(model, moved)
    return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    function: Callable[..., Any], options: tuple[Any, ...], model: nnx.Module, images: Images, keys: jax.Array | None
) -> tuple[Any, dict[str, Any]]:
    result = function(model, images, keys, *options)
    return result, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def _watched(
    model: Backbone, images: Images, keys: jax.Array | None, stages: tuple[int, ...], is_watched: bool
) -> tuple[Features, list[BlockRun]]:
    """Returns the features and, if needed, the records for `watch`, without the blocks, which are not arrays."""
    runs: list[Any] = []
    watch = (lambda run: runs.append(run._replace(number=None, block=None))) if is_watched else None
    return model._features(images, keys, stages, watch), runs


def _are_keys(keys: Any) -> bool:
    """Returns whether an array is a row of PRNG keys, typed or raw (as from jax.random.PRNGKey)."""
    return (
        keys.ndim == 1 if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys.ndim == 2 and keys.dtype == "uint32"
    )


def _mix(block: Block, tokens: Tokens, paths: Any, keys: jax.Array | None) -> tuple[Tokens, Evidence]:
    return block.mix(tokens, paths, keys)


def _transform(block: Block, tokens: Tokens, keys: jax.Array | None) -> Tokens:
    return block.transform(tokens, keys)
