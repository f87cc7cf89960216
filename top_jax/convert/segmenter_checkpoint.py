"""Converts official segmentation checkpoints (mmseg) to our segmenters and back, and classifiers to backbones."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from absl import logging
from flax import nnx

from top_jax.convert.checkpoint_files import read_state_dict, write_state_dict
from top_jax.convert.hub import local_file
from top_jax.convert.inferred_sizes import core, infer_model, of_segmenter
from top_jax.convert.key_maps import DECODE_HEAD, family_of, segmenter_keys
from top_jax.convert.position_embedding import fit_position_embedding, resize_position_embedding
from top_jax.convert.strict import (
    arrays_of,
    as_float32,
    check_finite,
    drop_mmcv_averages,
    fill,
    key_problems,
    without_wrappers,
)
from top_jax.convert.torch_checkpoint import HEADS
from top_jax.errors import InputError
from top_jax.models import (
    BackboneConfig,
    DenseVimConfig,
    PlainMambaConfig,
    Segmenter,
    SegmenterConfig,
    segmenter_config,
)
from top_jax.models.backbone import checked_rngs
from top_jax.models.segmenter import NUM_MAPS, default_stages
from top_jax.models.vim import rotary_tables
from top_jax.models.weights import Weights, is_of_classes, shapes_only, variables_by_path
from top_jax.pruning import Reduction
from top_jax.values import flag, one_of, refused
from top_jax.values import path as path_of

POSITIONS: Final = "backbone.pos_embed"
ROTARY: Final = ("backbone.rope.freqs_cos", "backbone.rope.freqs_sin")
AUXILIARY_HEAD: Final = "auxiliary_head."


def load_torch_segmenter(
    path: str | Path,
    name: str,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    aux_channels: int = 256,
    stages: tuple[int, ...] | None = None,
    fill: str = "frozen",
    pruning: Reduction | None = None,
    inference: str | None = None,
    slide_stride: int | None = None,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> Segmenter:
    """Builds the named segmenter with the weights of an official file, in eval mode.

    As for `top_jax.load_torch_checkpoint`, sizes that follow from the shapes of the weights need not be given. The same
    holds for `channels`, the number of classes and PlainMamba's `stages`. A position embedding of another grid than
    `img_size` is resized, with a warning. A PlainMamba keeps that of the file, so that it can be saved unchanged, and
    resizes it to each image.

    Args:
        path: a .pth file of mmseg (`{"meta", "state_dict"}`, read by PyTorch), or a .safetensors file with its keys.
        name: as for `top_jax.create_segmenter`.
        variant: which official ViM segmenter wrote the file, as for `create_segmenter`. The keys do not show it, except
            for `official_small`, whose file has a rotary embedding.
        num_classes: width of the logits; None takes the file's.
        channels: width of the decode head; None takes the file's.
        aux_channels: width of the auxiliary head; 0 for a file without one.
        stages: as for `create_segmenter`.
        fill: as for `create_segmenter`.
        pruning: a token reduction for the backbone; weights do not depend on it.
        inference: as for `create_segmenter`.
        slide_stride: as for `create_segmenter`.
        head: `load` takes the file's classes; `new` gives both heads a last layer with random weights.
        rngs: source of the weights of a new head, `nnx.Rngs(0)` by default.
        **overrides: sizes of the backbone, as for `create_segmenter`.

    Raises:
        InputError: the file cannot be read or is a classifier's; keys are missing, unexpected or misshapen (the message
            names them); a size differs from the file's; or it has another number of classes.
    """
    path = path if isinstance(path, str) else path_of("path", path)
    head, rngs = one_of("head", head, HEADS), checked_rngs(rngs)
    sizes = {"variant": variant, "aux_channels": aux_channels, "stages": stages}
    segmenter_config(name, **sizes, **overrides)  # raises before a large file is read
    state_dict = read_state_dict(local_file(path, name))
    if not of_segmenter(state_dict):
        raise InputError(
            f"{path} has no decode head, so it is not a segmenter's. Load a classifier's with "
            "top_jax.load_torch_checkpoint; to train a segmenter from it, set --config.init_from."
        )
    shapes = {key: array.shape for key, array in state_dict.items()}
    found = _inferred(shapes, name, overrides, path)
    chosen = {"channels": channels, "num_classes": num_classes, "stages": stages}
    settings = {**found, **{key: value for key, value in chosen.items() if value is not None}}
    config = segmenter_config(name, **{**sizes, **settings})
    choice = {"fill": fill, "inference": inference, "slide_stride": slide_stride}
    model = shapes_only(lambda rngs: Segmenter(config, pruning, **choice, rngs=rngs))
    try:
        load_segmenter_state_dict(model, state_dict, head=head, rngs=rngs, source=path)
    except InputError as error:
        raise InputError(f"{path} does not fit {name}: {error}") from None
    return model


def load_segmenter_state_dict(
    model: Segmenter,
    state_dict: Mapping[str, np.ndarray],
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    source: str | Path = "the checkpoint",
) -> tuple[str, ...]:
    """Loads an official state_dict (numpy arrays) into `model`, in place; see `load_torch_segmenter`.

    Returns:
        What was changed apart from the order of axes, in words.

    Raises:
        InputError: keys are missing, unexpected or misshapen, or numbers are not finite. The model is then unchanged.
    """
    config, sizes = model.config, model.config.backbone
    keys = segmenter_keys(config)
    state_dict, changes = without_wrappers(state_dict, keys)
    state_dict, widened = as_float32(state_dict)
    changes += widened + drop_mmcv_averages(state_dict)
    _take_rotary_tables(sizes, state_dict)
    wanted = keys
    if head == "new":
        wanted = [key for key in keys if not is_of_classes(key.ours)]
        for key in keys:
            if is_of_classes(key.ours):
                state_dict.pop(key.torch, None)
        changes.append(f"a new last layer for {config.num_classes} classes in each head, with random weights")
    if state_dict.keys() == {key.torch for key in wanted}:  # other keys mean another model, perhaps of another grid
        changes += fit_position_embedding(sizes, state_dict, None, source, name=POSITIONS)
    weights = variables_by_path(model)
    unmapped = set(weights) ^ {key.ours for key in keys}
    assert not unmapped, f"parameters without an official key, or the reverse: {unmapped}"
    missing, unexpected, misshapen, problems = key_problems(
        wanted, {key.ours: weights[key.ours].shape for key in wanted}, state_dict
    )
    if problems:
        names = (missing, unexpected, misshapen)
        raise InputError(f"{'; '.join(problems)}. {_advice(config, state_dict, *names)}")
    check_finite(state_dict)
    fill(model, wanted, state_dict)
    if head == "new":
        model.reset_classifier(config.num_classes, rngs)
    return tuple(changes)


def save_torch_segmenter(
    model: Segmenter, path: str | Path, *, overwrite: bool = False, class_names: Sequence[str] | None = None
) -> None:
    """Writes a segmenter's weights under mmseg's keys; `load_torch_segmenter` reads them back, bit for bit.

    Args:
        model: with weights. Its token reduction, its variant and its fill are not part of a checkpoint.
        path: a .pth or .pt file, `{"meta", "state_dict"}`, written by PyTorch; or a .safetensors file.
        overwrite: replace an existing file.
        class_names: names of the classes in the order of the logits (mmseg's `CLASSES`); None leaves them out.

    Raises:
        InputError: the suffix is unknown, the file exists, the names are not one for each class, or it cannot be
            written.
    """
    if not isinstance(model, Segmenter):
        raise refused("model", model, "a segmenter, as create_segmenter or load_torch_segmenter returns it")
    if model.is_abstract:
        raise InputError(
            "this model has only the shapes of its weights (abstract_segmenter); fill it first, or "
            "use create_segmenter."
        )
    path, overwrite = path_of("path", path), flag("overwrite", overwrite)
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(
            f"got {len(class_names)} class_names for a model of {model.num_classes} classes; pass one each."
        )
    meta = {} if class_names is None else {"CLASSES": list(class_names)}
    arrays = segmenter_state_dict(model)
    write_state_dict(path, arrays, entry="state_dict", overwrite=overwrite, class_names=class_names, meta=meta)


def segmenter_state_dict(model: Segmenter) -> dict[str, np.ndarray]:
    """Returns the official state_dict of a segmenter; inverts `load_segmenter_state_dict`."""
    arrays = arrays_of(model, segmenter_keys(model.config))
    sizes = model.config.backbone
    if _is_rotated(sizes):
        arrays |= dict(zip(ROTARY, rotary_tables(sizes.grid, sizes.embed_dim), strict=True))
    return arrays


def backbone_of_classifier(weights: Weights, there: BackboneConfig, here: BackboneConfig) -> Weights:
    """Converts a classifier's weights to those of a segmenter's backbone, `Segmenter.backbone`.

    The classifier's head is left out, and so are ViM's class token and its position, in the middle of the sequence. The
    official code drops the first position instead, which shifts half of the others by one. The position embedding is
    resized (bicubic).

    Args:
        weights: the classifier's, as `weights_of` returns them.
        there: its sizes.
        here: sizes of the segmenter's backbone.

    Raises:
        InputError: the two are not of one family.
    """
    if (
        isinstance(there, PlainMambaConfig) != isinstance(here, PlainMambaConfig)
        or type(there).__name__ == "DeitConfig"
    ):
        raise InputError(
            f"the classifier is a {family_of(there).name}, but the segmenter's backbone is a {family_of(here).name}; "
            "pass a classifier of the backbone's family."
        )
    embedding = np.asarray(weights["pos_embed"])
    if there.CLASS_TOKEN is not None:
        embedding = np.delete(embedding, there.num_patches // 2, axis=1)
    resized = resize_position_embedding(embedding, there.grid, here.grid, class_token=None)
    kept = {name: value for name, value in weights.items() if name not in ("head", "cls_token")}
    return {**kept, "pos_embed": resized}


def _inferred(
    shapes: Mapping[str, tuple[int, ...]], name: str, overrides: Mapping[str, Any], source: str | Path
) -> dict[str, Any]:
    """Returns the sizes that the shapes of the weights determine, and the overrides, for `segmenter_config`."""
    _, found = infer_model(shapes, name, overrides, checkpoint_img_size=True, source=source)
    plain = {core(key): shape for key, shape in shapes.items()}
    last = plain.get(f"{DECODE_HEAD}conv_seg.weight", ())
    if len(last) == 4:
        found |= {"num_classes": last[0], "channels": last[1]}
    sizes = segmenter_config(name, **found).backbone
    norms = sorted(int(match[1]) + 1 for key in plain if (match := re.fullmatch(r"norm_layer(\d+)\.weight", key)))
    if isinstance(sizes, PlainMambaConfig) and len(norms) in (NUM_MAPS - 1, NUM_MAPS):
        found["stages"] = (*norms, sizes.depth)[:NUM_MAPS]
    embedding = plain.get("pos_embed", ())
    side = math.isqrt(embedding[1]) if len(embedding) == 3 else 0
    pixels = side * (sizes.img_size[0] // sizes.grid[0])
    if not side or side**2 != embedding[1] or embedding[1] == sizes.num_patches:
        return found
    if isinstance(sizes, PlainMambaConfig) and "img_size" in overrides:
        logging.warning(
            "%s: its position embedding of %d x %d patches (%d pixels) is kept, and resized (bicubic) to each image.",
            *(source, side, side, pixels),
        )
    if isinstance(sizes, PlainMambaConfig) or "img_size" not in overrides:
        found["img_size"] = pixels
    return found


def _is_rotated(sizes: BackboneConfig) -> bool:
    return isinstance(sizes, DenseVimConfig) and sizes.variant == "official_small"


def _take_rotary_tables(sizes: BackboneConfig, state_dict: dict[str, np.ndarray]) -> None:
    """Removes the buffers of the rotary embedding, which our model computes.

    Raises:
        InputError: they are missing, unexpected, or differ from what the model computes.
    """
    there = [name for name in ROTARY if name in state_dict]
    if not _is_rotated(sizes):
        if there:
            raise InputError(
                f"1 unexpected embedding ({there[0]}): it was trained with a rotary embedding; pass "
                "variant='official_small'."
            )
        return
    if len(there) < len(ROTARY):
        missing = ", ".join(name for name in ROTARY if name not in there)
        raise InputError(f"missing: {missing}. It was trained without a rotary embedding; pass another variant.")
    tables = [state_dict.pop(name) for name in ROTARY]
    side = math.isqrt(len(tables[0]))
    for name, table, ours in zip(ROTARY, tables, rotary_tables((side, side), sizes.embed_dim), strict=True):
        if table.shape != ours.shape or not np.allclose(table, ours, atol=1e-4):
            raise InputError(
                f"{name} {table.shape} is not the rotary embedding of a square grid, stretched to 14 x 14, of width "
                f"{sizes.embed_dim}; no other is supported."
            )


def _advice(
    config: SegmenterConfig,
    state_dict: Mapping[str, np.ndarray],
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> str:
    """Returns advice on keys that do not fit, as a sentence."""

    def only(names: Collection[str], *starts: str) -> bool:
        return bool(names) and all(name.startswith(starts) for name in names)

    last = state_dict.get(f"{DECODE_HEAD}conv_seg.weight")
    if last is not None and last.shape[:1] != (config.num_classes,) and not missing and not unexpected:
        return (
            f"The weights have {len(last)} classes, and this model has {config.num_classes}: pass "
            f"num_classes={len(last)}, or "
            'head="new" to start a new last layer (for training --config.init_head=new).'
        )
    if only(missing, AUXILIARY_HEAD) and not unexpected:
        return "They have no auxiliary head: pass aux_channels=0."
    if only(unexpected, AUXILIARY_HEAD) and not missing:
        return "They have an auxiliary head: pass its width, aux_channels."
    width = state_dict.get(f"{AUXILIARY_HEAD}conv_seg.weight")
    if width is not None and only(misshapen, AUXILIARY_HEAD) and not missing and not unexpected:
        return f"Pass aux_channels={width.shape[1]}."
    if only(missing, "backbone.norm_layer") or only(unexpected, "backbone.norm_layer"):
        return f"Their maps are taken after other blocks than {config.stages}: pass stages (counted from 1)."
    return (
        "Choose the model, the variant and the sizes that the checkpoint was trained with; maps after "
        f"{default_stages(config.backbone.depth)} are the default."
    )
