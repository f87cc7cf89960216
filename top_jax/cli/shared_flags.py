"""Flags that several commands share: the config, the checkpoint, and the processes of a distributed run.

A command calls the `define_*` functions that it needs, and --help lists what they define. Until a flag is read, only
absl and `top_jax.config` are loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from top_jax.cli import config_file
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.optional import installed, optional_package

if TYPE_CHECKING:
    from top_jax.build import Model
    from top_jax.data import Source
    from top_jax.inference import Classifier


def define_config(*, required: bool = True, help_text: str = config_file.CONFIG_HELP) -> flags.FlagHolder[Any]:
    """Defines --config, and with it --config.key=value for each key of the file."""
    config_file.COMMAND_LINE.clear()
    if installed("ml_collections"):
        holder = config_file.config_flags().DEFINE_config_file(
            "config", None, help_text, lock_config=True, sys_argv=config_file.COMMAND_LINE
        )
    else:  # without ml_collections; `with_config` refuses flags that need it
        holder = flags.DEFINE_string("config", None, help_text)
    if required:
        flags.mark_flag_as_required("config")
    return holder


def read_config(holder: flags.FlagHolder[Any], *, own_pruning: bool = True) -> RunConfig:
    """Returns the config of the command line, checked.

    Args:
        holder: what `define_config` returned.
        own_pruning: whether the config says how tokens are reduced; False if other flags of the command do.

    Raises:
        InputError: the config file returns no config, or a value in it is out of range, or it leaves out the pruning of
            the run in --checkpoint.
    """
    if not installed("ml_collections"):  # `with_config` has checked that it is a run
        from top_jax.training.run_directory import RunDirectory

        return RunDirectory(config_file.config_source().partition(":")[2]).read_config()
    config = holder.value
    if not isinstance(config, optional_package("ml_collections", purpose="--config").ConfigDict):
        try:
            _ = config.model  # ml_collections keeps an OSError until the config is used
        except OSError as error:
            if problem := config_file.config_error(error):
                raise problem from error
        except AttributeError:
            pass
        raise InputError(
            f"config file {config_file.config_source()} returns {type(config).__name__} from get_config(), not a "
            "ConfigDict; return make_config(...), as configs/vim_digits_top.py does."
        )
    checked = RunConfig.from_config_dict(config)
    if "checkpoint" in flags.FLAGS:
        checked = _with_data_of_run(checked)
        if own_pruning:
            _check_same_use(checked)
    return _inferred(checked)


def _inferred(config: RunConfig) -> RunConfig:
    """Returns the config, completed from its image folder if `data.infer` is set."""
    if not config.data.infer:
        return config
    from top_jax.data import infer

    return infer(config)


def _with_data_of_run(config: RunConfig) -> RunConfig:
    """Returns the config with the data of the run in --checkpoint if the config does not say where its own data is.

    The ImageNet configs do not, and a run on your own images that started from one of them needs no ImageNet. Data
    settings on the command line win.
    """
    given = [key.removeprefix("data.") for key in _keys_given() if key.startswith("data.")]
    if config.data.is_bundled or config.data.data_dir is not None or {"source", "name"} & set(given):
        return config
    for path, trained in _trained_runs():
        if not trained.data.is_bundled and trained.data.data_dir is None:
            continue
        if (trained.data.source, trained.data.name) != (config.data.source, config.data.name):
            logging.warning(
                "the config %s does not say where its data is; taking that of the run %s: %s",
                *(config_file.config_name(), path, trained.data.data_dir or trained.data.source),
            )
        data = dataclasses.replace(trained.data, **{key: getattr(config.data, key) for key in given})
        classes = (config if "model.num_classes" in _keys_given() else trained).model.num_classes
        return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, num_classes=classes))
    return config


def _keys_given() -> dict[str, Any]:
    """Returns the values of --config.key=value on the command line, by dotted key."""
    return config_file.config_flags().get_override_values(flags.FLAGS["config"]) if installed("ml_collections") else {}


def _check_same_use(config: RunConfig) -> None:
    """Raises InputError if a run would be used for another task, or a pruned run as a dense model unasked."""
    dense = not config.pruning.after_blocks and "pruning.after_blocks" not in _keys_given()
    kinds = ("a classifier", "a segmenter")
    for path, trained in _runs():
        if trained.model.is_segmenter != config.model.is_segmenter:
            raise InputError(
                f"the run {path} is {kinds[trained.model.is_segmenter]}, and the config {config_file.config_name()} is "
                f"{kinds[config.model.is_segmenter]}; leave out --config."
            )
        if dense and trained.pruning.after_blocks:
            raise InputError(
                f"the run {path} was trained with pruning after blocks {trained.pruning.after_blocks}, but the config "
                f"{config_file.config_name()} has none; leave out --config, or pass --config.pruning.after_blocks=() "
                "for the dense model."
            )


def check_data_is_known() -> None:
    """Raises InputError if the config came with converted weights, because its data settings are only defaults."""
    file, _, run = config_file.config_source().partition(":")
    if file != config_file.RUN_CONFIG or _was_trained(run):
        return
    if "data.source" not in _keys_given():
        raise InputError(
            f"the run {run} was converted from a file, which does not name its data; pass --config.data.source and "
            "what it needs, or --config=FILE."
        )


def open_evaluation(config: RunConfig, advice: str) -> Source:
    """Returns the config's evaluation split.

    Args:
        config: the run's config.
        advice: what to do if the split has another number of classes than the model, for the message.

    Raises:
        InputError: the config does not say which data it is for, the data is not there, or its labels or classes do not
            fit the model.
    """
    from top_jax.training.prepare import open_split

    check_data_is_known()
    return open_split(config, train=False, advice=advice)


def warn_of_changes(config: RunConfig, *, pruning: bool = True) -> None:
    """Warns of the settings of model, pruning and data that differ from those of the run in --checkpoint.

    A different grid of patches is left out, because reading the weights has already warned of it.

    Args:
        config: what the command uses.
        pruning: whether to compare the pruning too.
    """
    from top_jax.training.run_directory import changed_settings
    from top_jax.training.saved_weights import patches

    for path, trained in _runs():
        known = ("model.img_size", "model.stride") if patches(trained.model) != patches(config.model) else ()
        text = [
            f"{key} {there!r} -> {here!r}"
            for key, (there, here) in changed_settings(trained, config).items()
            if key not in known and (pruning or not key.startswith("pruning."))
        ]
        if text:
            logging.warning("these settings differ from those of the run %s: %s", path, ", ".join(text))


def _trained_runs() -> list[tuple[str, RunConfig]]:
    """Returns the trained run directories in --checkpoint; converted ones do not store their data settings."""
    return [(path, config) for path, config in _runs() if _was_trained(path)]


def _was_trained(run: str) -> bool:
    from top_jax.training.run_directory import RunDirectory

    return RunDirectory(run).metrics.is_file()  # which only training writes


def _runs() -> list[tuple[str, RunConfig]]:
    """Returns the run directories in --checkpoint, with their configs."""
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.saved_weights import is_run

    given = flags.FLAGS.checkpoint
    paths = [given] if isinstance(given, str) else given
    return [(path, RunDirectory(path).read_config()) for path in paths if is_run(path)]


def default_workdir(config: RunConfig) -> str:
    """Returns runs/<config name>, and the name of the data if the command line chose it: runs/vim_s_top_photos.

    A run that an earlier release started in runs/<config name> with the same data continues there.
    """
    from top_jax.training.run_directory import RunDirectory

    folder, data, given = f"runs/{config_file.config_name()}", config.data, _keys_given()
    # For other sources, data_dir is only the path of the data that is named elsewhere.
    in_a_folder = data.source in ("image_folder", "packed", "segmentation_folder")
    if not ({"data.source", "data.name"} & given.keys() or ("data.data_dir" in given and in_a_folder)):
        return folder
    run = RunDirectory(folder)
    if run.has_checkpoints():
        try:
            run.check_same_run(config)
            if run.read_config().data.data_dir == data.data_dir:
                return folder
        except InputError:
            pass
    name = Path(data.data_dir).absolute().stem if in_a_folder and data.data_dir else data.name or data.source
    return f"{folder}_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"


def define_checkpoint() -> flags.FlagHolder[Any]:
    """Defines --checkpoint, required, and --which and --ema, which choose among its weights."""
    _define_weights_choice()
    return flags.DEFINE_string("checkpoint", None, config_file.CHECKPOINT_HELP, required=True)


def define_checkpoints(why: str) -> flags.FlagHolder[Any]:
    """Defines the flags of `define_checkpoint`, with a --checkpoint that may be repeated; --help ends in `why`."""
    _define_weights_choice()
    return flags.DEFINE_multi_string("checkpoint", None, f"{config_file.CHECKPOINT_HELP} {why}", required=True)


def define_classifier() -> flags.FlagHolder[Any]:
    """Defines the flags of a command that runs a checkpoint on image files, and those for an official file's model."""
    flags.DEFINE_string(
        "model",
        None,
        "Model name of an official file, such as vim_small; by default inferred from the shapes of its weights.",
    )
    flags.DEFINE_multi_string(
        "override", [], "Size that the shapes of the weights do not determine, as key=value; repeatable."
    )
    flags.DEFINE_integer("batch_size", 32, "Images per call of the model.", lower_bound=1)
    return define_checkpoint()


def check_classifier(checkpoint: str) -> None:
    """Raises InputError for the run of a segmenter, before images are looked for; reads its config only."""
    from top_jax.build import not_a_classifier
    from top_jax.training.saved_weights import find_weights

    trained = find_weights(checkpoint, flags.FLAGS.model).trained
    if trained is not None and trained.model.is_segmenter:
        raise not_a_classifier("classification", checkpoint)


def open_classifier(checkpoint: str) -> Classifier:
    """Returns the checkpoint that the flags of `define_classifier` choose.

    Raises:
        InputError: no such checkpoint, a file that does not fit its model, or a run with --model.
    """
    from top_jax.inference import open_classifier

    given = flags.FLAGS
    sizes = parse_overrides(given.override)
    return open_classifier(checkpoint, given.model, which=given.which, ema=given.ema, **sizes)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the sizes in `key=value` flags; a value is a Python literal, such as (224, 320), or text.

    Raises:
        InputError: there is no =.
    """
    sizes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"--override={override}; needed: key=value, such as embed_dim=64.")
        try:
            sizes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            sizes[key] = text
    return sizes


def load_model(checkpoint: str | Path, config: RunConfig, class_names: Sequence[str] | None = None) -> Model:
    """Returns the config's model and reduction in eval mode, with the weights that --which and --ema choose.

    Args:
        checkpoint: a run directory or an official file.
        config: the run's config.
        class_names: classes of the data, in the order of its labels; the logits are put into this order. None leaves
            their order.

    Raises:
        InputError: no such checkpoint, weights of another model, class count or classes, or a reduction that the model
            cannot have.
    """
    from top_jax.build import build_abstract_model, build_reduction
    from top_jax.training.saved_weights import find_weights
    from top_jax.training.weights import fill

    model = build_abstract_model(config.model, build_reduction(config.pruning))
    choice = {"which": flags.FLAGS.which, "ema": flags.FLAGS.ema}
    saved = find_weights(checkpoint, config.model.name)
    weights = saved.for_model(config.model, **choice, class_names=class_names)
    warn_of_changes(config)
    return fill(model, weights)


def define_distributed() -> None:
    """Defines --distributed and the flags of a run over several processes."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Join a run of several processes (docs/guides/devices.md). SLURM, Cloud TPU, Open MPI and Kubernetes need no "
        "other flag; elsewhere set the next three too.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, reachable from every process.")
    flags.DEFINE_integer("num_processes", None, "Number of processes in the run.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_timeout", 20, "Stop if another process is silent for this many seconds.", lower_bound=1
    )
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait at the start for the other processes.", lower_bound=1)


def join_processes() -> None:
    """Joins the other processes if --distributed is set; call it before JAX looks for devices.

    Raises:
        InputError: the flags do not fit together, or more of them are needed.
        RunError: the other processes cannot be reached.
    """
    given = flags.FLAGS
    by_hand = {name: given[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    if not given.distributed:
        if extra := [name for name, value in by_hand.items() if value is not None]:
            raise InputError(f"--{extra[0]} is given without --distributed; add --distributed, or drop --{extra[0]}.")
        return

    from top_jax import distributed

    distributed.initialize(**by_hand, heartbeat_timeout=given.heartbeat_timeout, start_timeout=given.start_timeout)


def _define_weights_choice() -> None:
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Checkpoint of a run directory: best accuracy, or latest.")
    flags.DEFINE_boolean("ema", None, "Use the averaged weights; by default if the run kept them, and never of a file.")
