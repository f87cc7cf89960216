"""Infers a model's sizes from the shapes of its official weights, and its family from their names.

Shapes determine neither DeiT's number of heads nor settings without weights, such as drop_path and reorder_parameters.
Image size and stride follow from the number of positions only where one of the two is known.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from top_jax.convert.key_maps import DECODE_HEAD, FAMILIES
from top_jax.errors import InputError
from top_jax.models import MODELS, BackboneConfig, DeitConfig, PlainMambaConfig, VimConfig, model_config
from top_jax.models.sizes import MambaConfig
from top_jax.values import height_width, one_of

# Parts of a key that come from module wrappers: DistributedDataParallel and DataParallel, torch.compile, FSDP,
# checkpointing.
WRAPPERS: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
HOLDERS: Final = ("model", "backbone")  # attributes in which training frameworks hold the model

Shapes = Mapping[str, tuple[int, ...]]


def unwrapped(name: str) -> str:
    """Returns a name without the parts that module wrappers add; no official name has such parts."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def core(name: str) -> str:
    """Returns a name without wrappers and without the leading attributes that hold the model."""
    parts = unwrapped(name).split(".")
    return ".".join(itertools.dropwhile(HOLDERS.__contains__, parts))


def of_segmenter(names: Collection[str]) -> bool:
    """Returns whether keys are those of a segmenter, not of a classifier."""
    return any(core(name).startswith(DECODE_HEAD) for name in names)


def family_of_keys(names: Collection[str]) -> type[BackboneConfig] | None:
    """Returns the config type of the family most of whose keys, for one block, are present, or None."""
    names = {core(name) for name in names}
    share = {}
    for kind, family in FAMILIES.items():
        wanted = {core(key.torch) for key in family.keys(kind(depth=1))}
        share[kind] = len(wanted & names) / len(wanted)
    best = max(share, key=lambda kind: share[kind])
    return best if share[best] > 0.5 else None


def infer_model(
    shapes: Mapping[str, tuple[int, ...]],
    name: str | None,
    overrides: Mapping[str, Any],
    *,
    checkpoint_img_size: Any = None,
    source: Any = "the checkpoint",
) -> tuple[str, dict[str, Any]]:
    """Returns the name and the overrides of the model that an official state_dict belongs to.

    Args:
        shapes: shapes of the weights by official name, perhaps changed by wrappers.
        name: the model's, or None to find the nearest named model.
        overrides: settings given by the user, which take precedence; one that the shapes contradict is an error.
            `num_classes` may differ from the head's, which is checked when the head is loaded.
        checkpoint_img_size: the image size of the weights, if it is known to differ from the model's.
        source: name of the checkpoint in errors.

    Raises:
        InputError: no name, and keys of no known family; a setting that the shapes contradict; the sizes of another
            named model; or a re-sized DeiT without `num_heads`.
    """
    kind = family_of_keys(shapes)
    if name is None and kind is None:
        raise InputError(f"{source} has the keys of no known family; name its model, one of {', '.join(MODELS)}.")
    if name is not None and type(MODELS[one_of("model", name, MODELS)]) is not kind:
        return name, dict(overrides)  # the check of the keys reports what is wrong
    assert kind is not None
    shapes = {core(key): shape for key, shape in shapes.items()}
    found = {key: value for key, value in _SIZES[kind](shapes).items() if value is not None}
    classes = found.pop("num_classes", None)
    if wrong := [
        key for key in found if key in overrides and found[key] not in (overrides[key], tuple_of(overrides[key]))
    ]:
        its, came = (", ".join(f"{key}={sizes[key]}" for key in wrong) for sizes in (found, overrides))
        raise InputError(
            f"{source} has {its}, but the model has {came}; pass the file's sizes (as --config.model.{wrong[0]}="
            f"{found[wrong[0]]} to train), or choose another file."
        )
    name = _named(kind, found) if name is None else name
    base, chosen = MODELS[name], {**found, **overrides}
    _check_same_name(name, kind, found, overrides, source)
    if kind is DeitConfig and chosen.get("embed_dim") != base.embed_dim and "num_heads" not in overrides:
        raise InputError(
            f"{source} is a DeiT of embed_dim={chosen['embed_dim']}, whose shapes do not determine num_heads; "
            "pass num_heads (DeiT's own heads are 64 wide)."
        )
    if classes is not None:
        chosen = {"num_classes": classes, **chosen}
    if checkpoint_img_size is None and "img_size" not in overrides:
        chosen |= _image_size(name, chosen, shapes)
    return name, {key: value for key, value in chosen.items() if key in overrides or getattr(base, key) != value}


def tuple_of(value: Any) -> Any:
    """Returns a list as a tuple, and anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _check_same_name(
    name: str, kind: type, found: Mapping[str, Any], overrides: Mapping[str, Any], source: Any
) -> None:
    """Raises InputError if the sizes are exactly those of a named model other than the requested one."""
    if all(getattr(MODELS[name], key) == value or key in overrides for key, value in found.items()):
        return
    for other, config in MODELS.items():
        if isinstance(config, kind) and all(getattr(config, key) == value for key, value in found.items()):
            raise InputError(f"{source} has the sizes of {other}, but {name} was requested; pass {other}.")


def _named(kind: type, found: Mapping[str, Any]) -> str:
    """Returns the named model of a family that shares the most of these sizes; the smallest one on a tie."""
    names = [name for name, config in MODELS.items() if isinstance(config, kind)]
    return max(names, key=lambda name: sum(getattr(MODELS[name], key) == value for key, value in found.items()))


def _image_size(name: str, chosen: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Returns the image size that follows from the number of positions, if only one is possible.

    Assumes square images. If the stride is unknown too, the number of positions may fit both another image size and a
    smaller stride; then nothing is inferred.
    """
    config = model_config(name, **chosen)
    positions = _size(shapes, "pos_embed", 1)
    num_patches = (positions or 0) - (config.CLASS_TOKEN is not None)
    side = math.isqrt(max(num_patches, 0))
    if num_patches <= 0 or side**2 != num_patches or num_patches == config.num_patches:
        return {}
    if isinstance(config, MambaConfig) and "stride" not in chosen:
        for stride in range(1, config.patch_size):
            if _grid(config, config.img_size, stride) == (side, side):
                return {}
    stride = getattr(config, "stride", config.patch_size)
    pixels = (side - 1) * stride + (stride if isinstance(config, PlainMambaConfig) else config.patch_size)
    return {"img_size": height_width("img_size", pixels)}


def _grid(config: MambaConfig, img_size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    try:
        return dataclasses.replace(config, img_size=img_size, stride=stride).grid
    except InputError:  # patches do not tile the image at this stride
        return None


def _size(shapes: Shapes, key: str, axis: int, ndim: int = 3) -> int | None:
    """Returns one side of a weight; None if it is missing, or of another rank or empty."""
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) == ndim and min(shape) > 0 else None


def _depth(shapes: Shapes, blocks: str) -> int | None:
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    return max(numbers) + 1 if numbers else None


def _ratio(wide: int | None, narrow: int | None) -> float | None:
    return wide / narrow if wide and narrow else None


def _whole_ratio(wide: int | None, narrow: int | None) -> int | None:
    return wide // narrow if wide and narrow and wide % narrow == 0 else None


def _vim_sizes(shapes: Shapes) -> dict[str, Any]:
    mixer, width = "layers.0.mixer", _size(shapes, "patch_embed.proj.weight", 0, 4)
    return {
        "embed_dim": width,
        "depth": _depth(shapes, "layers"),
        "patch_size": _size(shapes, "patch_embed.proj.weight", 2, 4),
        "d_state": _size(shapes, f"{mixer}.A_log", 1, 2),
        "expand": _whole_ratio(_size(shapes, f"{mixer}.A_log", 0, 2), width),
        "d_conv": _size(shapes, f"{mixer}.conv1d.weight", 2),
        "num_classes": _size(shapes, "head.weight", 0, 2),
    }


def _plain_mamba_sizes(shapes: Shapes) -> dict[str, Any]:
    mixer, width = "layers.0.mamba", _size(shapes, "patch_embed.projection.weight", 0, 4)
    half = _size(shapes, "patch_embed.projection.weight", 2, 4)
    tails = (int(match[1]) for key in shapes if (match := re.fullmatch(r"layers\.(\d+)\.dw\.0\.weight", key)))
    convs = [key for key, shape in shapes.items() if key.startswith("patch_embed.convs.") and len(shape) == 4]
    return {
        "embed_dim": width,
        "depth": _depth(shapes, "layers"),
        "patch_size": half and 2 * half,
        "d_state": _size(shapes, f"{mixer}.A_log", 1, 2),
        "expand": _whole_ratio(_size(shapes, f"{mixer}.A_log", 0, 2), width),
        "d_conv": _size(shapes, f"{mixer}.conv2d.weight", 2, 4),
        "num_convs_patch_embed": len(convs),
        "layers_with_dwconv": tuple(sorted(tails)),
        "num_classes": _size(shapes, "head.fc.weight", 0, 2),
    }


def _deit_sizes(shapes: Shapes) -> dict[str, Any]:
    width = _size(shapes, "patch_embed.proj.weight", 0, 4)
    return {
        "embed_dim": width,
        "depth": _depth(shapes, "blocks"),
        "patch_size": _size(shapes, "patch_embed.proj.weight", 2, 4),
        "mlp_ratio": _ratio(_size(shapes, "blocks.0.mlp.fc1.weight", 0, 2), width),
        "num_classes": _size(shapes, "head.weight", 0, 2),
    }


_SIZES: Final = {VimConfig: _vim_sizes, PlainMambaConfig: _plain_mamba_sizes, DeitConfig: _deit_sizes}
