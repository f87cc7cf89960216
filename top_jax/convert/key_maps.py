"""Maps between official PyTorch checkpoints and our models: for every key, our parameter and the order of its axes.

One map per family, each in the order of its checkpoint. A new family adds its function and a line of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import numpy as np

from top_jax.models import MODELS, BackboneConfig, DeitConfig, PlainMambaConfig, SegmenterConfig, VimConfig
from top_jax.models.heads import POOL_SCALES
from top_jax.models.segmenter import NUM_MAPS

Path = tuple[str | int, ...]
"""Path of a parameter in our model: ("blocks", 3, "norm", "scale") is model.blocks[3].norm.scale."""

DECODE_HEAD: Final = "decode_head."  # the start of keys that only a segmenter has
LARGEST_COUNT: Final = 2**24  # float32 holds every whole number up to it


@dataclasses.dataclass(frozen=True)
class Layout:
    """Conversion of a PyTorch array to ours: drop a unit axis, then permute the others.

    Attributes:
        axes: PyTorch's axes in our order; None keeps their order.
        unit_axis: an axis of size 1 that PyTorch has and we do not, or None.
        count: int64 in PyTorch and float32 in our models (see `BatchNorm.num_batches`), exact up to LARGEST_COUNT.
        meaning: the change of axes in words, for `KeySummary`; empty if there is none.
    """

    axes: tuple[int, ...] | None = None
    unit_axis: int | None = None
    count: bool = False
    meaning: str = ""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Converts a PyTorch array to our layout."""
        if self.count:
            array = array.astype(np.float32)
        if self.unit_axis is not None:
            array = np.squeeze(array, self.unit_axis)
        return array if self.axes is None else np.transpose(array, self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts one of our arrays to PyTorch's layout; the inverse of `to_ours`."""
        if self.count:
            array = np.asarray(np.rint(array)).astype(np.int64)  # an average of counts (EMA) need not be whole
        array = array if self.axes is None else np.transpose(array, np.argsort(self.axes))
        return array if self.unit_axis is None else np.expand_dims(array, self.unit_axis)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns PyTorch's shape of our `shape`."""
        return self.to_torch(np.broadcast_to(np.float32(0), shape)).shape  # a view: nothing is allocated


SAME: Final = Layout()
LINEAR: Final = Layout(axes=(1, 0), meaning="[out, in] -> [in, out]")
CONV2D: Final = Layout(axes=(2, 3, 1, 0), meaning="[out, in, h, w] -> [h, w, in, out]")
TRANSPOSED_CONV2D: Final = Layout(axes=(0, 2, 3, 1), meaning="[in, out, h, w] -> [in, h, w, out]")
DEPTHWISE_CONV2D: Final = Layout(axes=(1, 2, 0), unit_axis=1, meaning="[E, 1, h, w] -> [h, w, E]")
DEPTHWISE_CONV1D: Final = Layout(axes=(1, 0), unit_axis=1, meaning="[E, 1, taps] -> [taps, E]")
COUNT: Final = Layout(count=True)


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter or buffer: its official key, its path in our model, and the layout between the two."""

    torch: str
    ours: Path
    layout: Layout


def vim_keys(config: VimConfig) -> list[Key]:
    """Lists the keys of a ViM checkpoint (hustvl/Vim, bimamba_type="v2")."""
    return [
        *([] if config.CLASS_TOKEN is None else [Key("cls_token", ("cls_token",), SAME)]),
        Key("pos_embed", ("pos_embed",), SAME),
        Key("patch_embed.proj.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key("patch_embed.proj.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _vim_block(index)),
        Key("norm_f.weight", ("norm", "scale"), SAME),
        *_head("head", config),
    ]


def _vim_block(index: int) -> Iterator[Key]:
    block, mixer = f"layers.{index}", f"layers.{index}.mixer"
    ours: Path = ("blocks", index, "mixer")
    yield Key(f"{block}.norm.weight", ("blocks", index, "norm", "scale"), SAME)
    yield Key(f"{mixer}.in_proj.weight", (*ours, "in_proj", "kernel"), LINEAR)
    yield Key(f"{mixer}.out_proj.weight", (*ours, "out_proj", "kernel"), LINEAR)
    for direction, suffix in (("forward", ""), ("backward", "_b")):
        here: Path = (*ours, direction)
        yield Key(f"{mixer}.conv1d{suffix}.weight", (*here, "conv_kernel"), DEPTHWISE_CONV1D)
        yield Key(f"{mixer}.conv1d{suffix}.bias", (*here, "conv_bias"), SAME)
        yield Key(f"{mixer}.x_proj{suffix}.weight", (*here, "x_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.weight", (*here, "dt_proj", "kernel"), LINEAR)
        yield Key(f"{mixer}.dt_proj{suffix}.bias", (*here, "dt_bias"), SAME)
        yield Key(f"{mixer}.A{suffix}_log", (*here, "A_log"), SAME)
        yield Key(f"{mixer}.D{suffix}", (*here, "D"), SAME)


def plain_mamba_keys(config: PlainMambaConfig) -> list[Key]:
    """Lists the keys of a PlainMamba checkpoint (mmcls: backbone.*, head.fc.*), buffers included."""
    stem = "backbone.patch_embed"
    return [
        Key("backbone.pos_embed", ("pos_embed",), SAME),
        *_conv_batch_norm(f"{stem}.stem", 0, ("patch_embed", "stem")),
        *(
            key
            for index in range(config.num_convs_patch_embed)
            for key in _conv_batch_norm(f"{stem}.convs", 3 * index, ("patch_embed", "convs", index))
        ),
        Key(f"{stem}.projection.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key(f"{stem}.projection.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _plain_mamba_block(config, index)),
        *_norm("backbone.ln1", ("norm",)),
        *_head("head.fc", config),
    ]


def _plain_mamba_block(config: PlainMambaConfig, index: int) -> Iterator[Key]:
    layer, mixer = f"backbone.layers.{index}", f"backbone.layers.{index}.mamba"
    block: Path = ("blocks", index)
    ours: Path = (*block, "mixer")
    yield from _norm(f"{layer}.norm", (*block, "norm"))
    yield Key(f"{mixer}.A_log", (*ours, "A_log"), SAME)
    yield Key(f"{mixer}.D", (*ours, "D"), SAME)
    yield Key(f"{mixer}.direction_Bs", (*ours, "direction_Bs"), SAME)
    yield Key(f"{mixer}.conv2d.weight", (*ours, "conv_kernel"), DEPTHWISE_CONV2D)
    yield Key(f"{mixer}.conv2d.bias", (*ours, "conv_bias"), SAME)
    yield Key(f"{mixer}.x_proj.weight", (*ours, "x_proj", "kernel"), LINEAR)
    for name in ("in_proj", "dt_proj", "out_proj"):
        yield from _linear(f"{mixer}.{name}", (*ours, name))
    if index in config.layers_with_dwconv:
        yield Key(f"{layer}.dw.0.weight", (*block, "tail", "kernel"), DEPTHWISE_CONV2D)
        yield from _batch_norm(f"{layer}.dw.1", (*block, "tail", "norm"))


def deit_keys(config: DeitConfig) -> list[Key]:
    """Lists the keys of a DeiT checkpoint (facebookresearch/deit, timm); those of EViT are the same."""
    return [
        Key("cls_token", ("cls_token",), SAME),
        Key("pos_embed", ("pos_embed",), SAME),
        Key("patch_embed.proj.weight", ("patch_embed", "proj", "kernel"), CONV2D),
        Key("patch_embed.proj.bias", ("patch_embed", "proj", "bias"), SAME),
        *(key for index in range(config.depth) for key in _deit_block(index)),
        *_norm("norm", ("norm",)),
        *_head("head", config),
    ]


def _deit_block(index: int) -> Iterator[Key]:
    block, ours = f"blocks.{index}", ("blocks", index)
    yield from _norm(f"{block}.norm1", (*ours, "norm1"))
    yield from _linear(f"{block}.attn.qkv", (*ours, "attn", "qkv"))
    yield from _linear(f"{block}.attn.proj", (*ours, "attn", "proj"))
    yield from _norm(f"{block}.norm2", (*ours, "norm2"))
    yield from _linear(f"{block}.mlp.fc1", (*ours, "mlp", "fc1"))
    yield from _linear(f"{block}.mlp.fc2", (*ours, "mlp", "fc2"))


def segmenter_keys(config: SegmenterConfig) -> list[Key]:
    """Lists the keys of a segmenter's checkpoint (mmseg), without the buffers of a rotary embedding."""
    sizes = config.backbone
    keys = vim_keys(sizes) if isinstance(sizes, VimConfig) else plain_mamba_keys(cast(PlainMambaConfig, sizes))
    prefix = "backbone." if isinstance(sizes, VimConfig) else ""  # PlainMamba's keys have the prefix already
    return [
        *(Key(f"{prefix}{key.torch}", ("backbone", *key.ours), key.layout) for key in keys),
        *(
            key
            for index, stage in enumerate(config.own_norms)
            for key in _norm(f"backbone.norm_layer{stage - 1}", ("map_norms", index))
        ),
        *(_vim_neck(sizes.patch_size) if isinstance(sizes, VimConfig) else ()),
        *_uper_head(),
        *(_fcn_head() if config.aux_channels else ()),
    ]


def _vim_neck(patch_size: int) -> Iterator[Key]:
    yield from _upsampling("backbone.fpn1.0", ("neck", "up1"))
    if patch_size != 8:
        yield from _batch_norm("backbone.fpn1.1", ("neck", "bn"))
        yield from _upsampling("backbone.fpn1.3", ("neck", "up1_again"))
        yield from _upsampling("backbone.fpn2.0", ("neck", "up2"))


def _upsampling(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "kernel"), TRANSPOSED_CONV2D)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)


def _uper_head() -> Iterator[Key]:
    torch, ours = "decode_head", "decode_head"
    yield from _conv_seg(torch, ours)
    for index in range(len(POOL_SCALES)):
        yield from _conv_module(f"{torch}.psp_modules.{index}.1", (ours, "psp_modules", index))
    yield from _conv_module(f"{torch}.bottleneck", (ours, "bottleneck"))
    for name in ("lateral_convs", "fpn_convs"):
        for index in range(NUM_MAPS - 1):
            yield from _conv_module(f"{torch}.{name}.{index}", (ours, name, index))
    yield from _conv_module(f"{torch}.fpn_bottleneck", (ours, "fpn_bottleneck"))


def _fcn_head() -> Iterator[Key]:
    yield from _conv_seg("auxiliary_head", "auxiliary_head")
    yield from _conv_module("auxiliary_head.convs.0", ("auxiliary_head", "convs", 0))


def _conv_seg(torch: str, ours: str) -> Iterator[Key]:
    yield Key(f"{torch}.conv_seg.weight", (ours, "classifier", "conv_seg", "kernel"), CONV2D)
    yield Key(f"{torch}.conv_seg.bias", (ours, "classifier", "conv_seg", "bias"), SAME)


def _conv_module(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.conv.weight", (*ours, "conv", "kernel"), CONV2D)
    yield from _batch_norm(f"{torch}.bn", (*ours, "bn"))


def _head(torch: str, config: BackboneConfig) -> Iterator[Key]:
    if config.num_classes:
        yield from _linear(torch, ("head",))


def _linear(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "kernel"), LINEAR)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)


def _norm(torch: str, ours: Path) -> Iterator[Key]:
    yield Key(f"{torch}.weight", (*ours, "scale"), SAME)
    yield Key(f"{torch}.bias", (*ours, "bias"), SAME)


def _conv_batch_norm(sequential: str, index: int, ours: Path) -> Iterator[Key]:
    yield Key(f"{sequential}.{index}.weight", (*ours, "conv", "kernel"), CONV2D)
    yield from _batch_norm(f"{sequential}.{index + 1}", (*ours, "norm"))


def _batch_norm(torch: str, ours: Path) -> Iterator[Key]:
    yield from _norm(torch, ours)
    yield Key(f"{torch}.running_mean", (*ours, "mean"), SAME)
    yield Key(f"{torch}.running_var", (*ours, "var"), SAME)
    yield Key(f"{torch}.num_batches_tracked", (*ours, "num_batches"), COUNT)


@dataclasses.dataclass(frozen=True)
class Family:
    """The official checkpoints of one family of models.

    Attributes:
        name: as its paper spells it.
        keys: lists every parameter and buffer of a checkpoint, from the model's config.
        entry: the entry of a .pth file that holds the state_dict.
        position_embedding: key of the position embedding.
    """

    name: str
    keys: Callable[[Any], list[Key]]
    entry: str
    position_embedding: str


FAMILIES: Final[dict[type, Family]] = {
    VimConfig: Family("ViM", vim_keys, "model", "pos_embed"),
    PlainMambaConfig: Family("PlainMamba", plain_mamba_keys, "state_dict", "backbone.pos_embed"),
    DeitConfig: Family("DeiT", deit_keys, "model", "pos_embed"),
}


def family_of(config: BackboneConfig) -> Family:
    """Returns the family of a model."""
    return next(family for kind, family in FAMILIES.items() if isinstance(config, kind))


def official_keys(config: BackboneConfig) -> list[Key]:
    """Lists every parameter and buffer of an official checkpoint of this size, with its path in our model."""
    return family_of(config).keys(config)


def models_of(kind: type) -> list[str]:
    """Lists the named models of a family, given the type of its configs."""
    return [name for name, config in MODELS.items() if isinstance(config, kind)]
