"""Loads official weights into our models and saves them back; every key must match."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from flax import nnx

from top_jax.convert.checkpoint_files import read_state_dict, write_state_dict
from top_jax.convert.hub import is_name, local_file, official_model
from top_jax.convert.inferred_sizes import family_of_keys, infer_model, of_segmenter
from top_jax.convert.key_maps import FAMILIES, Key, family_of, models_of, official_keys
from top_jax.convert.key_summary import KeySummary, key_summary
from top_jax.convert.official_files import OFFICIAL_FILES, model_of, official_name
from top_jax.convert.position_embedding import check_official_stride, fit_position_embedding
from top_jax.convert.strict import (
    arrays_of,
    as_float32,
    check_finite,
    drop_mmcv_averages,
    fill,
    key_problems,
    without_wrappers,
)
from top_jax.errors import InputError
from top_jax.models import Backbone, BackboneConfig, abstract_model, model_config
from top_jax.models.backbone import checked_rngs
from top_jax.models.weights import is_of_classes, variables_by_path
from top_jax.pruning import Reduction
from top_jax.values import flag, height_width, one_of, refused
from top_jax.values import path as path_of

HEADS: Final = ("load", "new")  # ways to use a checkpoint's classifier


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with official weights, its name, settings and keys.

    Attributes:
        model: in eval mode.
        name: the model's name, given or inferred.
        overrides: its settings that differ from the named model's.
        summary: every key of the checkpoint.
    """

    model: Backbone
    name: str
    overrides: dict[str, Any]
    summary: KeySummary


def load_torch_checkpoint(
    path: str | Path,
    name: str | None = None,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds the named model with the weights of an official file, in eval mode.

    Sizes that the shapes of the weights determine need not be given: embed_dim, depth, patch_size, d_state, expand,
    d_conv, mlp_ratio, num_classes, layers_with_dwconv, num_convs_patch_embed; and img_size for a square image, unless
    another stride may explain the number of positions. DeiT's num_heads cannot be inferred.

    Args:
        path: a .pth file (read by PyTorch), a .safetensors file with the same keys (read without PyTorch), a Hugging
            Face folder with one of them, or a name: `pretrained:vim_small`, `hf://OWNER/REPO/FILE`
            (`top_jax.convert.hub`).
        name: a model name, as for `create_model`; None takes the nearest one to the weights.
        pruning: a token reduction for the model; weights do not depend on it.
        ema: take the averaged weights, `model_ema` or `state_dict_ema` of a .pth file.
        head: `load` takes the file's classifier; `new` gives the model one with random weights, for other classes. A
            model of `num_classes=0` has none.
        rngs: source of the weights of a new head, `nnx.Rngs(0)` by default; loaded weights do not depend on it.
        checkpoint_img_size: the image size that the file was trained at; needed only to resize the position embedding
            of a grid that is not square.
        **overrides: as for `create_model`. With another `img_size` the position embedding is resized (bicubic), with a
            warning, because a different stride cannot be ruled out.

    Raises:
        InputError: the file cannot be read, keys are missing, unexpected or misshapen (the message names them), a size
            differs from the file's, it has another number of classes, or an official file was trained at another
            stride.
        RunError: the weights are not cached, and the Hub cannot be reached.
    """
    choice = {"head": head, "rngs": rngs, "checkpoint_img_size": checkpoint_img_size}
    return load_official(path, name, pruning, ema, **choice, **overrides).model


def load_official(
    path: str | Path,
    name: str | None = None,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Loaded:
    """Loads as `load_torch_checkpoint` does; also returns the name, the overrides and the keys."""
    path, ema = path if isinstance(path, str) else path_of("path", path), flag("ema", ema)
    head = one_of("head", head, HEADS)
    if checkpoint_img_size is not None:
        checkpoint_img_size = height_width("checkpoint_img_size", checkpoint_img_size)
    if not isinstance(pruning, Reduction | None):
        raise refused("pruning", pruning, "top_jax.Pruning(...), Evit(...), Merging(...), or None")
    if (Path(path) / "checkpoints").is_dir():
        raise InputError(f"{path} is a run directory; load it with top_jax.load_checkpoint.")
    if name is not None:  # raises before a large file is downloaded or read; an image may need the file's patch size
        model_config(name, **{key: value for key, value in overrides.items() if key != "img_size"})
    file = local_file(path, name)
    name, overrides = _of_official_file(path, file, name, overrides)
    if name is not None and official_name(file):
        check_official_stride(file, model_config(name, **overrides))
    state_dict = read_state_dict(file, ema=ema)
    if of_segmenter(state_dict):
        raise InputError(
            f"{path} holds a segmenter, and a classifier is needed; pass the config of a segmenter, or in Python use "
            "top_jax.load_torch_segmenter."
        )
    choice = {"checkpoint_img_size": checkpoint_img_size, "source": path}
    shapes = {key: array.shape for key, array in state_dict.items()}
    name, overrides = infer_model(shapes, name, overrides, **choice)
    check_official_stride(file, model_config(name, **overrides))
    model = abstract_model(name, pruning=pruning, **overrides)  # the file fills every weight
    try:
        changes = load_state_dict(model, state_dict, head=head, rngs=rngs, **choice)
    except InputError as error:
        raise InputError(f"{path} does not fit {name}: {error}") from None
    return Loaded(model, name, overrides, key_summary(model, changes))


def _of_official_file(
    source: str | Path, file: Path, name: str | None, overrides: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Adds the known facts about an official file: its model, and sizes that shapes do not determine (the stride).

    Raises:
        InputError: the file holds another model.
    """
    known = official_model(source)
    if known is None and (found := official_name(file)):
        known = model_of(found), dict(OFFICIAL_FILES[found].sizes)
    if known is None or name not in (None, known[0]):
        if known is not None and is_name(source):
            raise InputError(f"{source} is a {known[0]}, but {name} was requested; pass {known[0]}.")
        return name, overrides
    return known[0], {**known[1], **overrides}


def load_state_dict(
    model: Backbone,
    state_dict: Mapping[str, np.ndarray],
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    source: str | Path = "the checkpoint",
) -> tuple[str, ...]:
    """Loads an official state_dict (numpy arrays) into `model`, in place; see `load_torch_checkpoint`.

    Args:
        model: with or without weights.
        state_dict: by official name. What wrappers such as DistributedDataParallel and torch.compile add to the names
            is removed, in any combination.
        head: as for `load_torch_checkpoint`.
        rngs: as for `load_torch_checkpoint`.
        checkpoint_img_size: as for `load_torch_checkpoint`.
        source: name of the checkpoint in warnings.

    Returns:
        What was changed apart from the order of axes, in words.

    Raises:
        InputError: keys are missing, unexpected or misshapen, or numbers are not finite. The model is then unchanged.
    """
    head, rngs = one_of("head", head, HEADS), checked_rngs(rngs)
    keys = official_keys(model.config)
    weights = variables_by_path(model)
    state_dict, renamed = without_wrappers(state_dict, keys)
    state_dict, changes = as_float32(state_dict)
    changes = renamed + changes
    changes += drop_mmcv_averages(state_dict)
    if head == "new" or not model.config.num_classes:
        changes += _drop_head(model.config, state_dict)
        keys = [key for key in keys if not is_of_classes(key.ours)]
        weights = {path: weight for path, weight in weights.items() if path[0] != "head"}
    if state_dict.keys() == {key.torch for key in keys}:  # other keys mean another model, perhaps with another grid
        changes += fit_position_embedding(model.config, state_dict, checkpoint_img_size, source)
    unmapped = set(weights) ^ {key.ours for key in keys}
    assert not unmapped, f"parameters without an official key, or the reverse: {unmapped}"
    _check_keys(model.config, keys, {key.ours: weights[key.ours].shape for key in keys}, state_dict)
    check_finite(state_dict)
    fill(model, keys, state_dict)
    if head == "new":
        model.reset_classifier(model.config.num_classes, rngs)
        changes.append(f"a new head for {model.config.num_classes} classes, with random weights")
    return tuple(changes)


def save_torch_checkpoint(
    model: Backbone, path: str | Path, *, overwrite: bool = False, class_names: Sequence[str] | None = None
) -> None:
    """Writes a model's weights under their official keys; `load_torch_checkpoint` reads them back, bit for bit.

    Args:
        model: with weights. Its token reduction is not part of a checkpoint.
        path: a .pth or .pt file, written by PyTorch with the state_dict in the entry that the family's official code
            reads (`model`, for PlainMamba `state_dict`), or a .safetensors file, written without PyTorch.
        overwrite: replace an existing file.
        class_names: names of the classes in the order of the logits, to be kept in the file; None leaves them out.

    Raises:
        InputError: the suffix is unknown, the file exists, the names are not one for each class, or it cannot be
            written.
    """
    if not isinstance(model, Backbone):
        raise refused("model", model, "a model, as create_model or load_checkpoint returns it")
    if model.is_abstract:
        raise InputError(
            "this model has only the shapes of its weights (abstract_model); fill it first, or use create_model."
        )
    path, overwrite = path_of("path", path), flag("overwrite", overwrite)
    if class_names is not None and len(class_names) != model.config.num_classes:
        raise InputError(
            f"got {len(class_names)} class_names for a model of {model.config.num_classes} classes; pass one each."
        )
    entry = family_of(model.config).entry
    write_state_dict(path, state_dict_of(model), entry=entry, overwrite=overwrite, class_names=class_names)


def state_dict_of(model: Backbone) -> dict[str, np.ndarray]:
    """Returns the official state_dict of a model: float32, counts of batches int64; inverts `load_state_dict`."""
    return arrays_of(model, official_keys(model.config))


def _drop_head(config: BackboneConfig, state_dict: dict[str, np.ndarray]) -> list[str]:
    """Removes the classifier's keys; returns a description of the change."""
    of_head = [
        key.torch for key in official_keys(dataclasses.replace(config, num_classes=1)) if is_of_classes(key.ours)
    ]
    dropped = [state_dict.pop(name) for name in of_head if name in state_dict]
    return [f"the head of {len(dropped[0])} classes left out"] if dropped else []


def _check_keys(
    config: BackboneConfig,
    keys: list[Key],
    shapes: dict[Any, tuple[int, ...]],
    state_dict: Mapping[str, np.ndarray],
) -> None:
    """Raises InputError, with every problem at once, unless the keys, shapes and dtypes are the model's."""
    missing, unexpected, misshapen, problems = key_problems(keys, shapes, state_dict)
    if problems:
        its_head = [key.torch for key in keys if is_of_classes(key.ours)]
        found = _other_classes(config, state_dict) if not missing and not unexpected and len(misshapen) <= 2 else None
        if found:
            advice = other_classes(found, config.num_classes)
        elif missing == its_head and len(problems) == 1:
            advice = 'They have no head: pass num_classes=0 to leave it out, or head="new" to start one.'
        else:
            advice = _advice(config, state_dict.keys())
        raise InputError(f"{'; '.join(problems)}. {advice}")


def _other_classes(config: BackboneConfig, state_dict: Mapping[str, np.ndarray]) -> int | None:
    """Returns the number of classes of a state_dict's head if that is another than the model's, else None."""
    shapes = [state_dict[key.torch].shape for key in official_keys(config) if is_of_classes(key.ours)]
    found = {shape[0] for shape in shapes if shape}
    return found.pop() if len(found) == 1 and found != {config.num_classes} else None


def other_classes(there: int, here: int) -> str:
    """Returns advice on weights of another number of classes, as a sentence."""
    return (
        f'The weights have {there} classes, and this model has {here}: pass num_classes={there}, or head="new" for a '
        "new head (for training --config.init_head=new)."
    )


def _advice(config: BackboneConfig, names: Collection[str]) -> str:
    """Returns advice on keys that do not fit, as a sentence.

    Args:
        config: the model that the keys were meant for.
        names: the keys of the checkpoint.
    """
    if of_segmenter(names):
        return "It is a segmenter's (decode_head): use top_jax.load_torch_segmenter."
    if averages := [name for name in names if name.startswith("ema_")]:
        return (
            f"{len(averages)} of its keys, such as {averages[0]}, are buffers of mmcv's EMA hook, which swaps the two "
            "sets of weights when it saves: find out which set holds the averages, and save the set that you want "
            "under the plain names, without the ema_ keys."
        )
    if any(name.startswith(("dist_token", "head_dist.")) for name in names):
        return (
            "It is a distilled DeiT (dist_token, head_dist), which has a second class token and is not supported; use "
            "the checkpoint of the plain one (deit_*_patch16_224, not deit_*_distilled_*)."
        )
    if any("embeddings.patch_embeddings." in name for name in names):
        return "It is a model of the transformers library, which names its weights differently; use timm's file of it."
    kind = family_of_keys(names)
    prefix = _common_prefix(names)
    if kind is None and prefix and (kind := family_of_keys([name.removeprefix(prefix) for name in names])):
        return (
            f"Its keys are those of a {FAMILIES[kind].name} with the prefix {prefix!r}; save the state_dict without it."
        )
    if kind is None or kind is type(config):
        return "Choose the model and the overrides that the checkpoint was trained with."
    return f"Its keys look like those of a {FAMILIES[kind].name}: choose one of {', '.join(models_of(kind))}."


def _common_prefix(names: Collection[str]) -> str:
    """Returns the first part of the names, with its dot, if all share it; else an empty string."""
    firsts = {name.partition(".")[0] for name in names}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""
