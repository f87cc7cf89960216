"""Converts official checkpoints into run directories, which every other command reads, and back into files.

top-jax convert pretrained:vim_small runs/vim_s
top-jax convert vim_s.pth runs/vim_s [--model vim_small] [--override img_size=384 ...] [--ema]
top-jax convert runs/vim_s_top vim_s_top.pth
top-jax convert vim_s.pth vim_s.safetensors

SOURCE is a run directory, a .pth or .safetensors file with the official keys, a Hugging Face folder, or the name of
weights: pretrained:NAME, hf://OWNER/REPO/FILE. The model and its sizes are inferred from the shapes of the weights,
where these determine them. TARGET is a file if it ends in .pth, .pt or .safetensors, and a run directory otherwise. The
command prints every key, by module, and writes them as JSON.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from top_jax import files
from top_jax.cli import runner, shared_flags
from top_jax.config import RunConfig
from top_jax.errors import InputError

if TYPE_CHECKING:
    from top_jax.build import Model
    from top_jax.convert.key_summary import KeySummary
    from top_jax.training.run_directory import RunDirectory

NOT_IN_WEIGHTS = ("dtype", "drop_path", "implementation", "remat")  # settings that no weight depends on

_MODEL = flags.DEFINE_string(
    "model", None, "Model name, such as vim_small; by default inferred from the shapes of the weights."
)
_OVERRIDE = flags.DEFINE_multi_string(
    "override",
    [],
    "Size that the shapes of the weights do not determine, as key=value, such as num_heads=2; repeatable.",
)
_EMA = flags.DEFINE_boolean(
    "ema",
    None,
    "Use the averaged weights: model_ema or state_dict_ema of a .pth (default: no), or those of a run (default: if it "
    "kept them).",
)
_WHICH = flags.DEFINE_enum(
    "which", "best", ["best", "latest"], "Checkpoint of a run directory: best accuracy, or latest."
)
_CHECKPOINT_IMG_SIZE = flags.DEFINE_list(
    "checkpoint_img_size",
    None,
    "SIDE or HEIGHT,WIDTH in pixels of the images that a file was trained on; needed to resize a position embedding "
    "whose grid is not square.",
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace an existing TARGET file.")
_JSON = flags.DEFINE_string("json", None, "File for the report; by default in TARGET, or next to it.")


def main(arguments: list[str]) -> None:
    """Reads the source, checks every key, and writes the target."""
    from top_jax.training.saved_weights import find_weights, is_run

    if len(arguments) != 2:
        raise InputError(f"got {len(arguments)} arguments; needed: SOURCE and TARGET (--help).")
    source, target = arguments[0], Path(arguments[1])
    to_file = _check_target(Path(source), target)  # before reading, which may take a while
    config, model, report, ema = _read_run(Path(source)) if is_run(source) else _read_file(source)
    names = find_weights(source, config.model.name).class_names(config.model.num_classes)
    advice = (_write_file if to_file else _write_run)(target, config, model, names)
    print(f"{source} ({config.model.name}{', averaged weights' if ema else ''}) -> {target}\n")
    print(f"{report}\n\nevery key is used and every weight is set.\n{advice}")
    json_file = target.with_name(f"{target.name}.conversion.json") if to_file else target / "conversion.json"
    about = {"source": str(source), "target": str(target), "model": config.model.name, "ema": ema}
    files.save_json(_JSON.value or json_file, {**about, **report.to_dict()})


def _check_target(source: Path, target: Path) -> bool:
    """Returns whether the target is a file instead of a run directory.

    Raises:
        InputError: it exists already, or it does not suit this source.
    """
    from top_jax.convert.checkpoint_files import check_target, has_checkpoint_suffix
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.saved_weights import is_run

    runner.check_json(_JSON.value, source, target)
    if has_checkpoint_suffix(target):
        check_target(target, overwrite=_OVERWRITE.value)
        return True
    if is_run(source):
        raise InputError(
            f"{source} is a run directory, which can only become a file; the target {target} needs the suffix .pth or "
            ".safetensors."
        )
    _check_empty(RunDirectory(target))
    files.check_folder(target, str(target))
    return False


def _check_empty(run: RunDirectory) -> None:
    if run.has_checkpoints():
        raise InputError(f"{run.path} already holds checkpoints; choose another directory, or delete that one.")


def _read_file(source: str) -> tuple[RunConfig, Model, KeySummary, bool]:
    """Returns a file's config, model and key report, and whether the weights are averaged."""
    from top_jax.convert.torch_checkpoint import load_official
    from top_jax.models import MODELS
    from top_jax.training.saved_weights import find_weights
    from top_jax.values import one_of

    if _MODEL.value is not None:  # before the file is read
        one_of("model", _MODEL.value, MODELS)
    _sizes(_OVERRIDE.value, head="uper")
    _img_size(_CHECKPOINT_IMG_SIZE.value)
    if find_weights(source, _MODEL.value).is_segmenter():
        return _read_segmenter(source)
    loaded = load_official(
        source,
        _MODEL.value,
        ema=bool(_EMA.value),
        checkpoint_img_size=_img_size(_CHECKPOINT_IMG_SIZE.value),
        **_sizes(_OVERRIDE.value),
    )
    config = RunConfig.from_config_dict({"model": {"name": loaded.name, **loaded.overrides}})
    return config, loaded.model, loaded.summary, bool(_EMA.value)


def _read_segmenter(source: str) -> tuple[RunConfig, Model, KeySummary, bool]:
    """Reads a segmenter's file; the result is that of `_read_file`."""
    from top_jax.convert import load_torch_segmenter
    from top_jax.convert.key_summary import key_summary
    from top_jax.models import MODELS

    name = _MODEL.value
    if name is None or _EMA.value:
        raise InputError(f"{source} is a segmenter's file: pass --model, such as vim_tiny, and no --ema (it has none).")
    given = _sizes(_OVERRIDE.value, head="uper")
    model = load_torch_segmenter(source, name, **given)
    heads, sizes, usual = model.config, model.config.backbone, MODELS[name]
    settings = {
        field: getattr(sizes, field)
        for field in dataclasses.asdict(RunConfig().model)
        if hasattr(usual, field) and getattr(sizes, field) != getattr(usual, field)
    }
    settings |= {field: getattr(heads, field) for field in ("num_classes", "channels", "aux_channels", "stages")}
    variant = getattr(sizes, "variant", None)
    config = RunConfig.from_config_dict(
        {
            "model": {"name": name, "head": "uper", "variant": variant, "img_size": sizes.img_size, **settings},
            "optimizer": {"label_smoothing": 0.0},
        }
    )
    return config, model, key_summary(model), False


def _read_run(source: Path) -> tuple[RunConfig, Model, KeySummary, bool]:
    """Reads a run directory; the result is that of `_read_file`."""
    from top_jax.convert.key_summary import key_summary
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.weights import load_checkpoint

    config = RunDirectory(source).read_config()
    if _MODEL.value not in (None, config.model.name):
        raise InputError(f"--model={_MODEL.value}, but the run {source} has a {config.model.name}; drop --model.")
    for name, value in (("override", _OVERRIDE.value), ("checkpoint_img_size", _CHECKPOINT_IMG_SIZE.value)):
        if value:
            raise InputError(f"--{name} is only for files; the sizes of the run {source} are known, so drop it.")
    ema = config.optimizer.ema_decay is not None if _EMA.value is None else _EMA.value
    model = load_checkpoint(source, which=_WHICH.value, ema=ema)
    return config, model, key_summary(model, writing=True), ema


def _write_run(target: Path, config: RunConfig, model: Model, names: tuple[str, ...] | None) -> str:
    """Writes a run directory; returns how to use it."""
    from top_jax.models.weights import weights_of
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.weights import save_weights

    run, new = RunDirectory(target), not target.exists()
    with run.lock():
        _check_empty(run)  # another command may have written there meanwhile
        try:
            save_weights(run, weights_of(model))
            run.describe(config, None if names is None else {"class_names": list(names)})
        except BaseException:  # a failed conversion leaves no folder that looks like a run
            shutil.rmtree(run.path if new else run.checkpoints, ignore_errors=True)
            raise
    return (
        "use it with any command, for example (with a config of this model):\n"
        f"  top-jax evaluate --config CONFIG --checkpoint {target}"
    )


def _write_file(target: Path, config: RunConfig, model: Model, names: tuple[str, ...] | None) -> str:
    """Writes a file; returns how to use it."""
    from top_jax.convert import save_torch_checkpoint, save_torch_segmenter
    from top_jax.models import Segmenter

    if isinstance(model, Segmenter):
        save_torch_segmenter(model, target, overwrite=_OVERWRITE.value, class_names=names)
    else:
        save_torch_checkpoint(model, target, overwrite=_OVERWRITE.value, class_names=names)
    pruned = "the file has no pruning schedule; the run's is not saved in it.\n" if config.pruning.after_blocks else ""
    back = f"{shlex.quote(str(target))} RUN --model={config.model.name}{_overrides(config)}"
    reader = "load_torch_segmenter" if isinstance(model, Segmenter) else "load_torch_checkpoint"
    return (
        f"{pruned}it has the official code's keys; top_jax.{reader} reads it too. The way back:\n"
        f"  top-jax convert {back}"
    )


def _overrides(config: RunConfig) -> str:
    """Returns the --override flags for the sizes that differ from the named model's."""
    from top_jax.build import build_sizes
    from top_jax.models import MODELS

    usual, sizes = MODELS[config.model.name], build_sizes(config.model)
    given = {key: value for key, value in config.model.overrides().items() if key not in NOT_IN_WEIGHTS}
    heads = config.model.segmenter() if config.model.is_segmenter else {}
    different = {key: value for key, value in given.items() if getattr(sizes, key) != getattr(usual, key)}
    different |= {key: heads[key] for key in ("variant", "aux_channels", "stages") if key in heads}
    return "".join(f" {shlex.quote(f'--override={key}={value}')}" for key, value in different.items())


def _sizes(overrides: list[str], **more: Any) -> dict[str, Any]:
    """Returns the settings in --override, checked with `more` settings of the model."""
    settings = shared_flags.parse_overrides(overrides)
    optimizer = {"label_smoothing": 0.0}  # as a segmenter's run needs
    model = RunConfig.from_config_dict({"model": {**settings, **more}, "optimizer": optimizer}).model
    checked = model.overrides() | (model.segmenter() if model.is_segmenter else {})
    return {key: value for key, value in checked.items() if key in settings}


def _img_size(sides: list[str] | None) -> Any:
    if sides is None:
        return None
    try:
        sizes = [int(side) for side in sides]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise InputError(f"--checkpoint_img_size={','.join(sides)}; needed: SIDE, or HEIGHT,WIDTH in pixels.")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


if __name__ == "__main__":
    runner.run(main)
