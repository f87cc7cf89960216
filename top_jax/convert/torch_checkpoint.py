"""Official weights into our models and back, strictly: no key missing, none left over."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.convert.checkpoint_files import read_state_dict, write_state_dict
from top_jax.convert.key_maps import FAMILIES, LARGEST_COUNT, Key, family_of, models_of, official_keys
from top_jax.convert.key_summary import KeySummary, key_summary
from top_jax.convert.position_embedding import check_official_stride, fit_position_embedding
from top_jax.errors import InputError
from top_jax.models import Backbone, BackboneConfig, abstract_model, model_config
from top_jax.models.backbone import make_head
from top_jax.models.weights import variables_by_path
from top_jax.pruning import Reduction
from top_jax.values import counted, flag, height_width, one_of, refused
from top_jax.values import path as path_of

# Parts of a key that wrap a module: DistributedDataParallel and DataParallel, torch.compile, FSDP, checkpointing.
WRAPPERS: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
HOLDERS: Final = ("model", "backbone")  # names that a training framework gives to the model, in front of its keys
HEADS: Final = ("load", "new")
NAMED: Final = 5  # an error names this many keys of each kind of problem, and counts all


def load_torch_checkpoint(
    path: str | Path,
    name: str,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds the named model with the weights of an official file, in eval mode.

    Args:
        path: a .pth file (read by PyTorch), a .safetensors file with the same keys (read without PyTorch), or a Hugging
            Face folder with one of them.
        name: a model name, as for `create_model`.
        pruning: a token reduction for the model; weights do not depend on it.
        ema: take the averaged weights, `model_ema` or `state_dict_ema` of a .pth file.
        head: `load` takes the file's classifier, `new` starts a random one for `num_classes` classes.
        rngs: source of a new classifier's weights, `nnx.Rngs(0)` by default.
        checkpoint_img_size: the image size that the file was trained at; needed only to resize the position embedding
            of a grid that is not square.
        **overrides: as for `create_model`. With another `img_size` the position embedding is resized (bicubic), with a
            warning, because another stride looks the same.

    Raises:
        InputError: the file cannot be read, keys are missing, unexpected or misshapen (the message names them), or an
            official file was trained at another stride.
    """
    settings = {"head": head, "rngs": rngs, "checkpoint_img_size": checkpoint_img_size}
    return load_with_summary(path, name, pruning, ema, **settings, **overrides)[0]


def load_with_summary(
    path: str | Path,
    name: str,
    pruning: Reduction | None = None,
    ema: bool = False,
    *,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
    checkpoint_img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[Backbone, KeySummary]:
    """Does what `load_torch_checkpoint` does, and also returns a summary of every key."""
    path, ema, head = path_of("path", path), flag("ema", ema), one_of("head", head, HEADS)
    if checkpoint_img_size is not None:
        checkpoint_img_size = height_width("checkpoint_img_size", checkpoint_img_size)
    check_official_stride(path, model_config(name, **overrides))  # raises before a large file is read
    if not isinstance(pruning, Reduction | None):
        raise refused("pruning", pruning, "top_jax.Pruning(...), Evit(...), Merging(...), or None")
    state_dict = read_state_dict(path, ema=ema)  # before the model, which takes seconds to trace
    model = abstract_model(name, pruning=pruning, **overrides)  # the file fills every weight
    try:
        changes = load_state_dict(
            model, state_dict, head=head, rngs=rngs, checkpoint_img_size=checkpoint_img_size, source=path
        )
    except InputError as error:
        raise InputError(f"{path} does not fit {name}: {error}") from None
    return model, key_summary(model, changes)


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
        source: what warnings call the checkpoint.

    Returns:
        What was changed apart from the order of axes, in words.

    Raises:
        InputError: keys are missing, unexpected or misshapen, or numbers are not finite. The model is then unchanged.
    """
    keys = official_keys(model.config)
    weights = variables_by_path(model)
    state_dict, renamed = _without_wrappers(state_dict, keys)
    state_dict, changes = _as_float32(state_dict)
    changes = renamed + changes
    changes += _drop_mmcv_averages(state_dict)
    if head == "new":
        its_head = [key for key in keys if key.ours[0] == "head"]
        keys = [key for key in keys if key not in its_head]
        changes += _leave_out(state_dict, its_head, model.config.num_classes)
        classifier = make_head(model.config, rngs or nnx.Rngs(0))
        assert classifier is not None
        weights |= {("head", *path): weight for path, weight in variables_by_path(classifier).items()}
    if state_dict.keys() == {key.torch for key in keys}:  # other keys mean another model, perhaps with another grid
        changes += fit_position_embedding(model.config, state_dict, checkpoint_img_size, source)
    unmapped = set(weights) ^ {key.ours for key in official_keys(model.config)}
    assert not unmapped, f"parameters without an official key, or the reverse: {unmapped}"
    _check_keys(model.config, keys, {key.ours: weights[key.ours].shape for key in keys}, state_dict)
    _check_finite(state_dict)
    for key in keys:
        weight = weights[key.ours]
        weight.set_value(jnp.asarray(key.layout.to_ours(state_dict[key.torch]), weight.dtype))
    nnx.update(model, nnx.from_flat_state(weights))
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
    if isinstance(model.head.kernel.get_value(), jax.ShapeDtypeStruct):
        raise InputError("this model has only the shapes of its weights (abstract_model); fill it first.")
    path, overwrite = path_of("path", path), flag("overwrite", overwrite)
    if class_names is not None and len(class_names) != model.config.num_classes:
        raise InputError(f"got {len(class_names)} class_names for a model of {model.config.num_classes} classes.")
    entry = family_of(model.config).entry
    write_state_dict(path, state_dict_of(model), entry=entry, overwrite=overwrite, class_names=class_names)


def state_dict_of(model: Backbone) -> dict[str, np.ndarray]:
    """Returns the official state_dict of a model: float32, counts of batches int64; inverts `load_state_dict`."""
    weights = variables_by_path(model)
    result = {}
    for key in official_keys(model.config):
        array = key.layout.to_torch(np.asarray(weights[key.ours].get_value(), np.float32))
        result[key.torch] = np.array(array, order="C")  # a copy, because the writers ignore strides
    return result


def _without_wrappers(state_dict: Mapping[str, np.ndarray], keys: list[Key]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays under their official names, without what wrappers of the model added, and says what changed.

    Raises:
        InputError: two arrays would have the same name.
    """
    official = {_core(key.torch): key.torch for key in keys}
    result, renamed, sources = {}, [], {}
    for name, array in state_dict.items():
        unwrapped = _unwrapped(name)
        new = unwrapped if unwrapped in official.values() else official.get(_core(name), unwrapped)
        if new in result:
            raise InputError(
                f"{sources[new]} and {name} are the same weight, {new}, under two names; keep only one of the two sets."
            )
        result[new], sources[new] = array, name
        if new != name:
            renamed.append(f"{name} to {new}")
    return result, [f"{counted(len(renamed), 'key')} renamed, such as {renamed[0]}"] if renamed else []


def _unwrapped(name: str) -> str:
    """Returns a name without the parts that wrappers of a module add anywhere; no official name has them."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _core(name: str) -> str:
    """Returns a name without wrappers and without the attributes in front that hold the model."""
    parts = _unwrapped(name).split(".")
    return ".".join(itertools.dropwhile(HOLDERS.__contains__, parts))


def _as_float32(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts every float array to float32, and says what that changed."""
    result, changed = {}, Counter()
    for name, array in state_dict.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float32:
            changed[array.dtype.name] += 1
            array = array.astype(np.float32)
        result[name] = array
    verb = {"float64": "rounded"}
    return result, [
        f"{counted(count, f'{dtype} tensor')} {verb.get(dtype, 'widened')} to float32"
        for dtype, count in changed.items()
    ]


def _drop_mmcv_averages(state_dict: dict[str, np.ndarray]) -> list[str]:
    """Removes the buffers of mmcv's EMA hook: `ema_<name, with underscores for dots>` next to each `<name>`.

    The hook swaps the two sets before it saves, so the plain names, which the official code evaluates, hold the
    averages. A buffer without its plain twin stays, and is then an unexpected key.
    """
    twins = {f"ema_{name.replace('.', '_')}" for name in state_dict}
    averages = [name for name in state_dict if name in twins]
    for name in averages:
        del state_dict[name]
    return (
        [f"{counted(len(averages), 'buffer')} of mmcv's EMA hook left out, as the official code does"]
        if averages
        else []
    )


def _leave_out(state_dict: dict[str, np.ndarray], head: list[Key], num_classes: int) -> list[str]:
    """Removes a classifier, in place, and says so; a file without one is fine."""
    found = [state_dict.pop(key.torch) for key in head if key.torch in state_dict]
    of = f" of {len(found[0])} classes" if found and found[0].ndim else ""
    return [f"a new classifier for {num_classes} classes" + (f" replaces the file's{of}" if found else "")]


def _check_keys(
    config: BackboneConfig,
    keys: list[Key],
    shapes: dict[Any, tuple[int, ...]],
    state_dict: Mapping[str, np.ndarray],
) -> None:
    """Raises InputError, with every problem at once, unless the keys, shapes and dtypes are the model's."""
    known = {key.torch for key in keys}
    missing = [key.torch for key in keys if key.torch not in state_dict]
    unexpected = sorted(set(state_dict) - known)
    misshapen, unusable = [], []
    for key in keys:
        array = state_dict.get(key.torch)
        if array is None:
            continue
        needed = key.layout.torch_shape(shapes[key.ours])
        if array.shape != needed:
            misshapen.append(f"{key.torch} {array.shape} instead of {needed}")
        elif problem := _unusable(key, array):
            unusable.append(f"{key.torch} {problem}")
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("unusable", unusable))
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds if names]
    if problems:
        its_head = {key.torch: state_dict.get(key.torch) for key in keys if key.ours[0] == "head"}
        if not missing + unexpected + unusable and len(misshapen) == len(its_head) == sum(
            name.split()[0] in its_head for name in misshapen
        ):
            its_classes = {len(array) for array in its_head.values() if array is not None and array.ndim}
            advice = (
                f"It has {' or '.join(map(str, its_classes))} classes, and the model {config.num_classes}: start a new "
                "classifier with head='new' (--config.init_head=new), or pass the file's num_classes."
            )
        else:
            advice = _advice(config, state_dict.keys())
        raise InputError(f"{'; '.join(problems)}. {advice}")


def _unusable(key: Key, array: np.ndarray) -> str | None:
    """Returns what is wrong with the dtype or the values of an array of the right shape, or None."""
    if not key.layout.count:
        return None if array.dtype == np.float32 else f"of type {array.dtype.name} instead of a float"
    if not np.issubdtype(array.dtype, np.integer):
        return f"of type {array.dtype.name} instead of an integer"
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST_COUNT:
        return f"{array} is not in 0 .. 2**24, where a float32 counts exactly"
    return None


def _check_finite(state_dict: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in state_dict.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"not finite in float32: {counted(len(broken), 'tensor')} ({_some(broken)}); the training that wrote them "
            "diverged, or the file is damaged: take an earlier checkpoint."
        )


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _advice(config: BackboneConfig, names: Collection[str]) -> str:
    """Returns a sentence on what to do about keys that do not fit.

    Args:
        config: the model that the keys were meant for.
        names: the keys of the checkpoint.
    """
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
    kind = _family_of_keys(names)
    prefix = _common_prefix(names)
    if kind is None and prefix and (kind := _family_of_keys([name.removeprefix(prefix) for name in names])):
        return (
            f"Its keys are those of a {FAMILIES[kind].name} with the prefix {prefix!r}; save the state_dict without it."
        )
    if kind is None or kind is type(config):
        return "Choose the model and the overrides that the checkpoint was trained with."
    return f"Its keys look like those of a {FAMILIES[kind].name}: choose one of {', '.join(models_of(kind))}."


def _family_of_keys(names: Collection[str]) -> type | None:
    """Returns the config type of the family whose keys, for a model of one block, are mostly there, or None."""
    names = {_core(name) for name in names}
    share = {}
    for kind, family in FAMILIES.items():
        wanted = {_core(key.torch) for key in family.keys(kind(depth=1))}
        share[kind] = len(wanted & names) / len(wanted)
    best = max(share, key=lambda kind: share[kind])
    return best if share[best] > 0.5 else None


def _common_prefix(names: Collection[str]) -> str:
    """Returns the first part of the names, with its dot, if all share it; else an empty string."""
    firsts = {name.partition(".")[0] for name in names}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""
