"""Segmenters: UPerNet on a backbone, with token reduction between the blocks.

    images -> backbone -> maps after four blocks, filled where tokens were dropped -> neck -> decoder -> logits

Sources: hustvl/Vim, seg; ChenhongyiYang/PlainMamba, downstream/mmsegmentation; mmsegmentation's `EncoderDecoder`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import jax
from flax import nnx

from top_jax.errors import InputError
from top_jax.models.backbone import Backbone, call_compiled, checked_rngs, is_traced
from top_jax.models.features import FILLS, Features, to_grid
from top_jax.models.heads import FCNHead, UPerHead, VimNeck
from top_jax.models.layers import layer_norm
from top_jax.models.plain_mamba import DensePlainMamba, PlainMambaConfig
from top_jax.models.registry import MODELS, check_settings, model_config
from top_jax.models.resizing import AnyMap, resize, size_of
from top_jax.models.sizes import LARGEST_SIZE, MOST_CLASSES, BackboneConfig
from top_jax.models.vim import DenseVim, DenseVimConfig, VimConfig
from top_jax.models.weights import shapes_only
from top_jax.pruning import Reduction
from top_jax.typing import Array, Float, Images
from top_jax.values import one_of, refused, several, whole

INFERENCES: Final = ("slide", "whole")
VIM_IMG_SIZE: Final = (512, 512)
PLAIN_MAMBA_CHANNELS: Final = 512
NUM_MAPS: Final = 4
# Arguments of `create_segmenter` besides the sizes of the backbone.
SETTINGS: Final = ("num_classes", "fill", "variant", "channels", "aux_channels", "stages", "inference", "slide_stride")

ClassMap = AnyMap
"""float32 logits `[B, h, w, classes]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Sizes of a segmenter.

    Attributes:
        backbone: sizes of the backbone: a `DenseVimConfig` or a `PlainMambaConfig`, of 0 classes.
        num_classes: width of the logits.
        channels: width of the decode head.
        aux_channels: width of the auxiliary head, used only in training; 0 for none.
        stages: increasing 1-based numbers of the four blocks after which the maps are taken.

    Raises:
        InputError: a value out of range.
    """

    backbone: BackboneConfig
    num_classes: int = 150
    channels: int = 512
    aux_channels: int = 256
    stages: tuple[int, ...] = (6, 12, 18, 24)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("num_classes", 1, MOST_CLASSES),
            ("channels", 1, LARGEST_SIZE),
            ("aux_channels", 0, LARGEST_SIZE),
        ):
            object.__setattr__(self, name, whole(name, getattr(self, name), least, most))
        depth = self.backbone.depth
        needed = f"{NUM_MAPS} increasing block numbers from 1 to {depth}, such as {default_stages(depth)}"
        try:
            stages = tuple(whole("stage", one, 1, depth) for one in several("stages", self.stages, needed))
        except InputError:
            raise refused("stages", self.stages, needed) from None
        if len(stages) != NUM_MAPS or list(stages) != sorted(set(stages)):
            raise refused("stages", self.stages, needed)
        object.__setattr__(self, "stages", stages)
        if isinstance(self.backbone, VimConfig):
            side = 4 if self.backbone.patch_size == 8 else 2
            if min(self.backbone.grid) < side:
                raise InputError(
                    f"img_size={self.backbone.img_size} has {self.backbone.grid} patches; ViM's neck needs at least "
                    f"{side} x {side}."
                )

    @property
    def is_vim(self) -> bool:
        """Whether the backbone is a ViM, with a neck and maps of one image size; else it is a PlainMamba."""
        return isinstance(self.backbone, VimConfig)

    @property
    def aux_map(self) -> int:
        """Index of the map that the auxiliary head reads."""
        return 2 if self.is_vim else 3

    @property
    def own_norms(self) -> tuple[int, ...]:
        """Blocks (1-based) whose map has its own norm; after the last block it has the final norm. None for ViM."""
        return () if self.is_vim else tuple(stage for stage in self.stages if stage != self.backbone.depth)


def default_stages(depth: int) -> tuple[int, ...]:
    """Returns the blocks after each quarter of the depth, as all official models have them."""
    return tuple(math.ceil(depth * quarter / NUM_MAPS) for quarter in range(1, NUM_MAPS + 1))


class Segmenter(nnx.Module):
    """A backbone with UPerNet's heads.

    A PlainMamba takes images of any size; a ViM those of its `img_size`, to which slide inference cuts others
    (`top_jax.models.sliding`).

    Attributes:
        config: sizes.
        backbone: a `DenseVim` or a `DensePlainMamba`, without a classifier.
        map_norms: the norms of PlainMamba's maps, except that of the last block.
        neck: a `VimNeck`, or None.
        decode_head: a `UPerHead`.
        auxiliary_head: an `FCNHead`, or None.
        fill: how maps are filled where tokens were dropped, one of `top_jax.models.features.FILLS` (`to_grid`).
        inference: `slide` or `whole`: how images of any size are segmented.
        slide_stride: pixels from one window to the next of slide inference.
        data: how photographs are prepared, for `top_jax.segment`: `load_checkpoint` keeps its run's `DataConfig` here.
            None is the official protocol.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        pruning: Reduction | None = None,
        *,
        fill: str = "frozen",
        inference: str | None = None,
        slide_stride: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.data: Any = None
        self.fill = one_of("fill", fill, FILLS)
        self.inference = ("slide" if config.is_vim else "whole") if inference is None else inference
        one_of("inference", self.inference, INFERENCES)
        sizes, crop = config.backbone, min(config.backbone.img_size)
        self.slide_stride = crop * 2 // 3 if slide_stride is None else whole("slide_stride", slide_stride, 1, crop)
        width, dtype = sizes.embed_dim, sizes.dtype
        options = {"dtype": dtype, "rngs": rngs}
        self.backbone: Backbone
        if isinstance(sizes, DenseVimConfig):
            self.backbone = DenseVim(sizes, pruning, rngs=rngs)
        else:
            assert isinstance(sizes, PlainMambaConfig)
            self.backbone = DensePlainMamba(sizes, pruning, rngs=rngs)
        self.map_norms = nnx.List([layer_norm(width, 1e-6, rngs) for _ in config.own_norms])
        self.neck = nnx.data(VimNeck(width, sizes.patch_size, **options) if config.is_vim else None)
        first = sizes.depth + 1  # the drop-paths have the lower indices
        self.decode_head = UPerHead(
            [width] * NUM_MAPS, config.channels, config.num_classes, dropout_index=first, **options
        )
        aux_channels, classes = config.aux_channels, config.num_classes
        auxiliary = FCNHead(width, aux_channels, classes, dropout_index=first + 1, **options) if aux_channels else None
        self.auxiliary_head = nnx.data(auxiliary)

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.config.num_classes

    @property
    def reduction(self) -> Reduction:
        """Token reduction of the backbone."""
        return self.backbone.reduction

    @property
    def scan_implementation(self) -> str | None:
        """Implementation of the backbone's scans."""
        return self.backbone.scan_implementation

    @property
    def is_abstract(self) -> bool:
        """Whether the model has only the shapes of its weights."""
        return self.backbone.is_abstract

    def reset_classifier(self, num_classes: int, rngs: nnx.Rngs | None = None) -> None:
        """Replaces the last layer of both heads, in place, by one for other classes; the other weights stay.

        Args:
            num_classes: width of the new logits.
            rngs: source of the new weights, `nnx.Rngs(0)` by default.

        Raises:
            InputError: an invalid number of classes or rngs.
        """
        self.config = dataclasses.replace(self.config, num_classes=whole("num_classes", num_classes))
        rngs = checked_rngs(rngs)
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                head.classifier.reset(self.config.num_classes, rngs)

    def __call__(self, images: Images, keys: jax.Array | None = None) -> Float[Array, "B H W classes"]:
        """Segments images. Outside of a JAX transformation the call is compiled once per set of shapes and settings.

        Args:
            images: float32 `[B, H, W, 3]`, normalised; a ViM's of its `img_size`.
            keys: `[B]` PRNG keys, one per image; needed in train mode.

        Returns:
            float32 logits `[B, H, W, num_classes]`: those of `logits`, resized to the image (bilinear).

        Raises:
            InputError: the images do not have the model's size.
        """
        decode, _ = self.logits(images, keys)
        return resize(decode, size_of(images))

    def logits(self, images: Images, keys: jax.Array | None = None) -> tuple[ClassMap, ClassMap | None]:
        """Returns the logits of the decode head and of the auxiliary head (or None), at the resolutions of these heads.

        Arguments and errors as for `__call__`. The decode head's are at a quarter of ViM's image size, and at a
        sixteenth of PlainMamba's; the auxiliary ones at a sixteenth.
        """
        if not is_traced():
            self.backbone.check(images, keys, (), None)
            return call_compiled(Segmenter.logits, self, images, keys)
        maps = self.maps(images, keys)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(maps[self.config.aux_map], keys)
        return self.decode_head(maps, keys), auxiliary

    def maps(self, images: Images, keys: jax.Array | None = None) -> tuple[AnyMap, ...]:
        """Returns the four maps that the heads read, float32, finest first. Arguments and errors as for `__call__`."""
        if not is_traced():
            self.backbone.check(images, keys, (), None)
            return call_compiled(Segmenter.maps, self, images, keys)
        maps = self.token_maps(self.backbone.features(images, keys, stages=self.config.stages))
        return maps if self.neck is None else self.neck(maps)

    def token_maps(self, features: Features) -> tuple[AnyMap, ...]:
        """Returns the backbone's four maps, filled and, for PlainMamba, normed: `[B, rows, columns, D]` each."""
        return tuple(to_grid(self._normed(i, stage), self.fill) for i, stage in enumerate(features.stages))

    def _normed(self, index: int, features: Features) -> Features:
        """Applies the norm of one map to tokens and canvas, before the fill: the fill `zero` stays zero."""
        if self.config.is_vim:
            return features
        norms = dict(zip(self.config.own_norms, self.map_norms, strict=True))
        norm: Any = norms.get(self.config.stages[index], self.backbone.norm)
        canvas = None if features.canvas is None else norm(features.canvas)
        return dataclasses.replace(features, x=norm(features.x), canvas=canvas)


def segmenter_config(
    name: str,
    *,
    num_classes: int = 150,
    variant: str | None = None,
    channels: int | None = None,
    aux_channels: int = 256,
    stages: tuple[int, ...] | None = None,
    **overrides: Any,
) -> SegmenterConfig:
    """Returns the sizes of a named segmenter, some of them overridden as in `create_segmenter`.

    Raises:
        InputError: as `create_segmenter`.
    """
    names = [other for other, config in MODELS.items() if isinstance(config, VimConfig | PlainMambaConfig)]
    base = MODELS[name if name in MODELS else one_of("model", name, names)]
    if not isinstance(base, VimConfig | PlainMambaConfig):
        raise InputError(f"{name} has no segmenter: no official one exists; choose one of {', '.join(names)}.")
    if isinstance(base, VimConfig):
        overrides = {"img_size": VIM_IMG_SIZE, **overrides}
    elif variant is not None:
        raise InputError(f"variant={variant!r} is a choice of ViM's; {name} has none, so leave it out.")
    own = [field.name for field in dataclasses.fields(base) if field.name != "num_classes"]
    check_settings(f"the segmenter {name}", overrides, (*SETTINGS, *own))
    sizes = model_config(name, **overrides, num_classes=0)
    if isinstance(sizes, VimConfig):
        fields = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
        sizes = DenseVimConfig(**fields, variant="residual" if variant is None else variant)
        channels = sizes.embed_dim if channels is None else channels
    if sizes.depth < NUM_MAPS:
        raise InputError(f"depth={sizes.depth}; a segmenter takes maps after {NUM_MAPS} blocks: pass at least that.")
    return SegmenterConfig(
        backbone=sizes,
        num_classes=num_classes,
        channels=PLAIN_MAMBA_CHANNELS if channels is None else channels,
        aux_channels=aux_channels,
        stages=default_stages(sizes.depth) if stages is None else stages,
    )


def create_segmenter(
    name: str,
    *,
    num_classes: int = 150,
    rngs: nnx.Rngs | None = None,
    pruning: Reduction | None = None,
    fill: str = "frozen",
    variant: str | None = None,
    channels: int | None = None,
    aux_channels: int = 256,
    stages: tuple[int, ...] | None = None,
    inference: str | None = None,
    slide_stride: int | None = None,
    **overrides: Any,
) -> Segmenter:
    """Builds a segmenter with random weights, in eval mode: UPerNet over a named backbone.

    Args:
        name: a ViM or a PlainMamba, such as `vim_tiny` or `plain_mamba_l1`.
        num_classes: width of the logits.
        rngs: source of the initial weights, `nnx.Rngs(0)` by default.
        pruning: how the backbone reduces tokens (`top_jax.pruning`); None is the dense model. It adds no parameters.
        fill: how maps are filled where tokens were dropped: `frozen` (the token as it left its last block), `nearest`,
            `carry` or `zero` (`top_jax.models.to_grid`). `zero` is zero after PlainMamba's norm of the map.
        variant: which official ViM segmenter the backbone follows (`top_jax.models.DenseVim`): `residual` (the default
            of None), `official_tiny` or `official_small`. PlainMamba has none.
        channels: width of the decode head; None is the backbone's for ViM, and 512 for PlainMamba.
        aux_channels: width of the auxiliary head, used only in training; 0 for none.
        stages: the four blocks, counted from 1, after which maps are taken; None takes every quarter of the depth.
        inference: `slide` or `whole`; None is `slide` for ViM and `whole` for PlainMamba, as officially.
        slide_stride: pixels from one window to the next; None is two thirds of the image size (341 of 512).
        **overrides: sizes of the backbone, as for `top_jax.create_model`. `img_size` is 512 by default for ViM, which
            takes no other image; PlainMamba takes any, and `img_size` is that of its stored position embedding.

    Raises:
        InputError: a DeiT, an unknown name or override, a value of another type or out of range, or sizes that do not
            fit together.
    """
    sizes = {"variant": variant, "channels": channels, "aux_channels": aux_channels, "stages": stages}
    config = segmenter_config(name, num_classes=num_classes, **sizes, **overrides)
    choice = {"fill": fill, "inference": inference, "slide_stride": slide_stride}
    model = Segmenter(config, pruning, **choice, rngs=checked_rngs(rngs))
    model.eval()
    return model


def abstract_segmenter(name: str, **settings: Any) -> Segmenter:
    """Returns the segmenter with only the shapes of its weights, to be filled from a checkpoint."""
    return shapes_only(lambda rngs: create_segmenter(name, rngs=rngs, **settings))
