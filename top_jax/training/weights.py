"""Reads and writes weights: those of a run directory, an official file, a seed or a teacher."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from top_jax import distributed
from top_jax.build import Model, build_abstract_model, build_model, build_reduction, build_sizes, segmenter_sizes
from top_jax.config import ModelConfig, RunConfig
from top_jax.convert import load_torch_checkpoint, load_torch_segmenter
from top_jax.convert.checkpoint_files import read_state_dict, weights_in_folder
from top_jax.convert.hub import is_name, local_file
from top_jax.convert.inferred_sizes import core
from top_jax.convert.key_maps import DECODE_HEAD
from top_jax.convert.position_embedding import resize_position_embedding
from top_jax.convert.segmenter_checkpoint import backbone_of_classifier
from top_jax.convert.torch_checkpoint import HEADS, other_classes
from top_jax.errors import InputError, RunError
from top_jax.models import Segmenter
from top_jax.models.backbone import checked_rngs
from top_jax.models.weights import Weights, is_of_classes, weights_of
from top_jax.training.class_names import class_names_of, in_order_of
from top_jax.training.run_directory import RunDirectory
from top_jax.training.seals import Damaged, reading, restore_sealed, sealed
from top_jax.values import counted, flag, one_of, whole
from top_jax.values import path as path_of

SCORES: Final = ("accuracy", "miou")  # a classifier's; a segmenter's
SLACK_BYTES: Final = 2_000_000  # metadata around the arrays, and metrics until the next checkpoint


def load_checkpoint(
    path: str | Path,
    which: str = "best",
    ema: bool | None = None,
    *,
    num_classes: int | None = None,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Loads the model of a run directory (of train.py or convert): weights and pruning, in eval mode.

    It is a classifier or a segmenter, as the run says.

    Args:
        path: the run directory.
        which: `best` (by evaluation accuracy, or mIoU) or `latest`.
        ema: whether to take the averaged weights; None takes them where the run kept them.
        num_classes: width of the logits; None is the run's own, 0 leaves the head out.
        head: `load` takes the run's classifier; `new` gives the model one with random weights, for other classes.
        rngs: source of the weights of a new head, `nnx.Rngs(0)` by default; loaded weights do not depend on it.

    Raises:
        InputError: no run directory, no such checkpoint, no averaged weights in it, or another number of classes
            without `head="new"`.
        RunError: the checkpoint is damaged.
    """
    path, head, rngs = path_of("path", path), one_of("head", head, HEADS), checked_rngs(rngs)
    if file := weights_in_folder(path):
        raise InputError(
            f"{path} is not a run directory but a folder of another library, with {file.name}; load it with "
            "load_torch_checkpoint(path, MODEL_NAME), or convert it."
        )
    run = RunDirectory(path)
    config = run.read_config()
    trained = config.model.num_classes
    wanted = trained if num_classes is None else whole("num_classes", num_classes, 0)
    if head == "load" and wanted not in (0, trained):
        raise InputError(f"the weights of {run.path} do not fit. {other_classes(trained, wanted)}")
    model = build_abstract_model(config.model, build_reduction(config.pruning))
    model = fill(model, read_weights(run, which, ema))
    if isinstance(model, Segmenter):
        model.data = config.data
    if head == "new" or not wanted:
        model.reset_classifier(wanted, rngs)
    return model


def initial_weights(config: RunConfig, class_names: Sequence[str] | None = None) -> Weights:
    """Returns the run's first weights: those of `init_from`, or random ones from its seed.

    Pruning adds no parameters, so the dense model's weights fit the pruned one. A segmenter can start from a
    classifier, whose weights become those of its backbone; all else is then random.

    Args:
        config: the run's config.
        class_names: names of its data's classes, as for `checkpoint_weights`.

    Raises:
        InputError: as `checkpoint_weights`.
        RunError: the checkpoint is damaged.
    """
    if config.init_from is not None:
        choice = {"head": config.init_head, "rngs": nnx.Rngs(config.seed)}
        if config.model.is_segmenter and not holds_segmenter(config.init_from, config.model.name):
            return _from_classifier(config.init_from, config.model, rngs=nnx.Rngs(config.seed))
        return checkpoint_weights(config.init_from, config.model, class_names=class_names, **choice)
    return weights_of(build_model(config.model, rngs=nnx.Rngs(config.seed)))


def checkpoint_weights(
    checkpoint: str | Path,
    config: ModelConfig,
    *,
    which: str = "best",
    ema: bool | None = None,
    class_names: Sequence[str] | None = None,
    head: str = "load",
    rngs: nnx.Rngs | None = None,
) -> Weights:
    """Reads the weights of a checkpoint for the model of `config`.

    Args:
        checkpoint: a run directory, an official .pth or .safetensors file, a Hugging Face folder with one, or a name
            (`top_jax.convert.hub`); `pretrained` alone stands for the official weights of the config's model.
        config: the model that they must fit.
        which: `best` or `latest`, of a run directory.
        ema: whether to take averaged weights; None takes them where a run kept them, and never from a file.
        class_names: classes of the data, in the order of its labels: the logits are put into this order, by the names
            that the checkpoint keeps. None, and a new classifier, leave them.
        head: `load` takes the checkpoint's classifier, `new` starts a random one.
        rngs: source of a new classifier's weights, `nnx.Rngs(0)` by default.

    A position embedding of another grid is resized (bicubic), with a warning.

    Raises:
        InputError: no such checkpoint, or weights of another model, class count or classes.
        RunError: the checkpoint is damaged.
    """
    head, rngs = one_of("head", head, HEADS), checked_rngs(rngs)
    path = _found(checkpoint, config.name)
    if path.is_dir():
        run = RunDirectory(path)
        _check_same_model(run, config, head)
        weights = _fitted(run, read_weights(run, which, ema), config)
        if head == "new":
            trained = dataclasses.replace(config, num_classes=run.read_config().model.num_classes)
            model = fill(build_abstract_model(trained), weights)
            model.reset_classifier(config.num_classes, rngs)
            weights = weights_of(model)
    else:
        weights = weights_of(_load_file(checkpoint, config, head=head, ema=bool(ema), rngs=rngs))
    if class_names is None or head == "new":
        return weights
    return in_order_of(class_names, weights, kept=class_names_of(path, config.num_classes), origin=path)


def holds_segmenter(checkpoint: str | Path, name: str | None) -> bool:
    """Returns whether a checkpoint, as for `checkpoint_weights`, is a segmenter's.

    Args:
        checkpoint: what to look into.
        name: the model's name, which `pretrained` alone stands for.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.
    """
    path = _found(checkpoint, name)
    if path.is_dir():
        return RunDirectory(path).read_config().model.is_segmenter
    return any(core(key).startswith(DECODE_HEAD) for key in read_state_dict(path))


def _found(checkpoint: str | Path, name: str | None) -> Path:
    """Returns the run directory or the file of a checkpoint, as for `checkpoint_weights`.

    Raises:
        InputError: there is none, or it cannot be downloaded.
    """
    path = local_file(checkpoint, name)
    path = weights_in_folder(path) or path
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist; pass a run directory or an official .pth or .safetensors file."
        )
    return path


def _load_file(checkpoint: str | Path, config: ModelConfig, *, head: str, ema: bool, rngs: nnx.Rngs) -> Model:
    """Loads an official file as the config's model, every size given, so that none is inferred."""
    sizes = build_sizes(config)
    settings = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    choice = {"head": head, "rngs": rngs}
    if not config.is_segmenter:
        return load_torch_checkpoint(checkpoint, config.name, ema=ema, **choice, **settings)
    if ema:
        raise InputError(f"{checkpoint} is a segmenter's file, which has no averaged weights; drop --ema.")
    heads = segmenter_sizes(config)
    settings |= {name: getattr(heads, name) for name in ("num_classes", "channels", "aux_channels", "stages")}
    return load_torch_segmenter(checkpoint, config.name, **choice, **settings)


def _from_classifier(checkpoint: str | Path, config: ModelConfig, *, rngs: nnx.Rngs) -> Weights:
    """Returns a segmenter's weights: its backbone's from a classifier, the others random."""
    path = _found(checkpoint, config.name)
    if path.is_dir():
        run = RunDirectory(path)
        there, classifier = build_sizes(run.read_config().model), read_weights(run)
    else:
        model = load_torch_checkpoint(checkpoint, config.name)
        there, classifier = model.config, weights_of(model)
    model = build_model(config, rngs=rngs)
    weights = weights_of(model)
    backbone = backbone_of_classifier(classifier, there, build_sizes(config))
    different = _first_difference(backbone, weights["backbone"])
    if different:
        raise InputError(
            f"the classifier {checkpoint} does not fit the segmenter's backbone: {different}; use the model settings "
            "that it was trained with. Only img_size and num_classes may differ."
        )
    logging.warning(
        "%s is a classifier: its weights become those of the backbone; neck, heads and maps' norms start at random.",
        checkpoint,
    )
    return {**weights, "backbone": jax.tree.map(jax.numpy.asarray, backbone)}


def _first_difference(there: Weights, here: Weights) -> str | None:
    """Describes the first array that two sets of weights do not both have, in the same shape."""
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (there, here))
    ]
    names = sorted(shapes[0].keys() | shapes[1].keys())
    different = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if not different:
        return None
    name = different[0]
    there_, here_ = (shape.get(name, "absent") for shape in shapes)
    return f"{counted(len(different), 'other shape')}, such as {name} ({there_} there, {here_} here)"


def is_run(checkpoint: str | Path) -> bool:
    """Returns whether a checkpoint is a run directory, not a name, a file or another library's folder."""
    return not is_name(checkpoint) and Path(checkpoint).is_dir() and weights_in_folder(checkpoint) is None


def about_weights(checkpoint: str | Path, which: str, ema: bool | None) -> dict[str, Any]:
    """Returns which weights `checkpoint_weights` takes, as JSON values: `which`, `step` and `ema` of a run."""
    if not is_run(checkpoint):
        return {"ema": bool(ema)}
    run = RunDirectory(checkpoint)
    kept_ema = run.read_config().optimizer.ema_decay is not None
    with reading(), _manager(run.checkpoints / which, by_accuracy=which == "best") as manager:
        return {"which": which, "step": _newest(manager), "ema": kept_ema if ema is None else ema}


def _check_same_model(run: RunDirectory, config: ModelConfig, head: str) -> None:
    """Raises InputError unless a run's weights fit, apart from what `checkpoint_weights` changes."""
    trained = run.read_config().model
    if trained.is_segmenter != config.is_segmenter:
        raise InputError(_other_kind(run.path, config))
    if head == "load" and trained.num_classes != config.num_classes:
        advice = other_classes(trained.num_classes, config.num_classes)
        raise InputError(f"checkpoint {run.path} does not fit. {advice}")
    there, here = (_fixed_part(abstract_weights(model)) for model in (trained, config))
    if (different := _first_difference(there, here)) is not None:
        raise InputError(
            f"checkpoint {run.path} holds another model: {different}; use the model settings that "
            "it was trained with. Only img_size and, with a new classifier, num_classes may differ."
        )


def _other_kind(path: Path, config: ModelConfig) -> str:
    """Returns the message for a segmenter's checkpoint where a classifier's is needed, or the reverse."""
    if config.is_segmenter:
        return (
            f"checkpoint {path} is a classifier's, and this model is a segmenter; pass a segmenter's, or train one "
            f"from it with --config.init_from={path}."
        )
    return f"checkpoint {path} is a segmenter's, and this model is a classifier; pass the config of a segmenter."


def _fixed_part(weights: Weights) -> Weights:
    """Returns the weights whose shapes depend neither on the image size nor on the number of classes."""

    flat = flatten_dict(weights)
    fixed = [path for path in flat if path[-1] != "pos_embed" and not is_of_classes(path)]
    return unflatten_dict({path: flat[path] for path in fixed})


def _fitted(run: RunDirectory, weights: Weights, config: ModelConfig) -> Weights:
    """Returns a run's weights with the position embedding of the model's grid, and warns if that was another one."""
    trained = run.read_config().model
    there, here = build_sizes(trained), build_sizes(config)
    if patches(trained) == patches(config):
        return weights
    part = weights["backbone"] if config.is_segmenter else weights
    embedding = np.asarray(part["pos_embed"])
    used = "is resized (bicubic)" if there.grid != here.grid else "is used as it is"
    logging.warning(
        "checkpoint %s was trained with %s, and this model has %s; its embedding of %d positions %s.",
        *(run.path, patches(trained), patches(config), embedding.shape[1], used),
    )
    resized = resize_position_embedding(embedding, there.grid, here.grid, class_token=here.CLASS_TOKEN)
    part = {**part, "pos_embed": jax.numpy.asarray(resized)}
    return {**weights, "backbone": part} if config.is_segmenter else part


def patches(config: ModelConfig) -> str:
    """Returns the grid and the stride of a model's patches as text; the shapes of its weights do not say them."""
    sizes = build_sizes(config)
    rows, columns = sizes.grid
    return f"a grid of {rows} x {columns} patches, stride {getattr(sizes, 'stride', sizes.patch_size)}"


def read_weights(run: RunDirectory, which: str = "best", ema: bool | None = None) -> Weights:
    """Reads the weights of a run directory's checkpoint; arguments and errors as for `load_checkpoint`."""
    one_of("which", which, ("best", "latest"))
    if ema is not None:
        ema = flag("ema", ema)
    config = run.read_config()
    kept_ema = config.optimizer.ema_decay is not None
    if ema and not kept_ema:
        raise InputError(
            f"{run.path} has no averaged weights (its optimizer.ema_decay is not set); use the plain ones (ema=False, "
            "--noema)."
        )
    weights = abstract_weights(config.model)
    like = {"params": weights, "ema": weights} if kept_ema else {"params": weights}
    other = "latest" if which == "best" else "best"
    found = _read(run, which, like, otherwise=f"choose the {other!r} one (which={other!r}, --which={other})")
    return found["ema" if (kept_ema if ema is None else ema) else "params"]


def _read(run: RunDirectory, which: str, like: dict[str, Weights], *, otherwise: str) -> dict[str, Weights]:
    try:
        found = _read_newest(run.checkpoints / which, like, by_accuracy=which == "best")
    except Damaged as error:
        raise RunError(
            f"the {which!r} checkpoint of {run.path} is damaged ({error}); {otherwise}, or restore it from a copy."
        ) from error
    if found is None:
        raise InputError(f"{run.path} has no {which!r} checkpoint yet; train on, or {otherwise}.")
    return found


def _read_newest(folder: Path, like: dict[str, Weights], *, by_accuracy: bool) -> dict[str, Weights] | None:
    """Reads the newest, or the most accurate, checkpoint in a folder; None where there is none."""
    with reading(), _manager(folder, by_accuracy=by_accuracy) as manager:
        step = _newest(manager)
        return None if step is None else restore_sealed(manager, step, {"weights": like})["weights"]


def _manager(folder: Path, *, by_accuracy: bool) -> ocp.CheckpointManager:
    best = score_of if by_accuracy else None
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, save_interval_steps=0, best_fn=best)
    return ocp.CheckpointManager(folder, options=options)


def _newest(manager: ocp.CheckpointManager) -> int | None:
    """Returns the step of the most accurate checkpoint, or of the latest where none has an accuracy."""
    step = manager.best_step()
    return manager.latest_step() if step is None else step  # a converted checkpoint has no accuracy


def check_room(folder: Path, content: Any, *, copies: int = 1, kept: str = "") -> None:
    """Raises RunError if the disk has no room for another checkpoint; with several processes all must call this.

    Checked before saving, because Orbax would fail in its threads, each of which prints its own traceback.

    Args:
        folder: a run's checkpoints/, which need not exist.
        content: arrays to save.
        copies: how often.
        kept: for the message: what there is already.
    """
    needed = copies * (int(1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(content))) + SLACK_BYTES)
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if distributed.any_process(free < needed):
        raise RunError(
            f"the disk is full: a checkpoint needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB left; "
            f"{kept or 'nothing was saved yet'}. Make room and start the same command again."
        )


def save_weights(run: RunDirectory, weights: Weights, which: tuple[str, ...] = ("best", "latest")) -> None:
    """Writes checkpoints of weights alone, as a converted model or a teacher has them.

    Raises:
        RunError: the disk has no room for them; nothing is written.
    """
    check_room(run.checkpoints, weights, copies=len(which))
    for name in which:
        with ocp.CheckpointManager(run.checkpoints / name) as manager:
            manager.save(0, args=sealed({"weights": {"params": weights}}))


def keeps_teacher(run: RunDirectory) -> bool:
    """Whether the run directory holds a whole copy of its teacher, in checkpoints/teacher."""
    return (run.checkpoints / "teacher" / "0").is_dir()


def teacher_weights(run: RunDirectory, config: RunConfig, class_names: Sequence[str] | None = None) -> Weights | None:
    """Reads the teacher's weights: the run's own copy, or `distillation.teacher` where it has none yet.

    A run keeps a copy (`keep_teacher`), so that the teacher is the same at every start, even if the source is gone.

    Args:
        run: the run directory; where it holds a copy, its config must be this one (`RunDirectory.check_same_run`).
        config: the run's config.
        class_names: names of its data's classes, as for `checkpoint_weights`.

    Returns:
        Weights of the dense model of the run's own size, on the default device; None for a run without a teacher.

    Raises:
        InputError: no such source, or weights of another model or class count.
        RunError: the run's copy is damaged.
    """
    if config.distillation.teacher is None:
        return None
    if keeps_teacher(run):
        like = {"params": abstract_weights(config.model)}
        return _read(run, "teacher", like, otherwise="delete it, to read it from distillation.teacher again")["params"]
    try:
        return checkpoint_weights(config.distillation.teacher, config.model, class_names=class_names)
    except InputError as error:
        raise InputError(f"config.distillation.teacher, the dense model of the run's own size: {error}") from error


def keep_teacher(run: RunDirectory, weights: Weights) -> None:
    """Writes the run's copy of its teacher, unless it is there; to be called once the directory is claimed."""
    if not keeps_teacher(run):
        # NumPy arrays: all processes have the same weights, and then one of them writes.
        save_weights(run, jax.tree.map(np.asarray, weights), which=("teacher",))


def abstract_weights(config: ModelConfig) -> Weights:
    """Returns the shapes of a model's weights, to restore into on the default device."""
    shapes = weights_of(build_abstract_model(config))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def fill(model: Model, weights: Weights) -> Model:
    """Returns the model with these weights."""
    return nnx.merge(nnx.graphdef(model), weights)


def score_of(metrics: Any) -> float:
    """Returns the number by which one checkpoint is better than another."""
    return next(metrics[name] for name in SCORES if name in metrics)
