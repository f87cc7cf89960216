"""Exports a checkpoint as StableHLO, with its weights and token reduction: one file that needs only JAX to run.

top-jax export --config configs/vim_s_top.py --checkpoint runs/a vim_s.stablehlo
top-jax export --config configs/vim_s_top.py --checkpoint vim_s.pth vim_s.stablehlo --batch=8 --normalize
top-jax export ... vim_s.stablehlo --batch=1 --platforms=cpu --stablehlo=vim_s.mlirbc

Before the file gets its name it is read back, and its logits are compared with the model's. To use it:

    with open("vim_s.stablehlo", "rb") as file:
        classify = jax.export.deserialize(file.read()).call
    logits = classify(images)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax import export

from top_jax import files
from top_jax.cli import runner, shared_flags, terminal
from top_jax.config import DataConfig, RunConfig
from top_jax.errors import InputError, RunError
from top_jax.optional import require

_CONFIG, _CHECKPOINT = shared_flags.define_config(), shared_flags.define_checkpoint()
_BATCH = flags.DEFINE_string("batch", "symbolic", "Images per call, or `symbolic` for any number.")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda"], "Platforms to export for: cpu, cuda, rocm, tpu.")
_NORMALIZE = flags.DEFINE_boolean(
    "normalize",
    False,
    "Include the normalisation, so that the input is uint8 pixels; by default it is normalised floats.",
)
_STABLEHLO = flags.DEFINE_string(
    "stablehlo",
    None,
    "File for the bare StableHLO too, for tools other than JAX: .mlirbc (portable bytecode) or .mlir (text). It needs "
    "one platform and one batch size.",
)
_IMAGES = flags.DEFINE_enum(
    "images", "random", ["random", "data"], "Images to compare on: random pixels, or the config's evaluation split."
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    1e-5,
    "Largest difference of a logit, as a share of the largest logit; a file that differs more is not written.",
    0.0,
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace existing files.")
_JSON = flags.DEFINE_string("json", None, "File for the report; by default OUT.json.")

CHECKED = 3  # images compared if the batch size is symbolic
STEPS = ("lowering", "writing", "comparing")


def main(arguments: list[str]) -> None:
    """Loads the model, lowers and writes it, reads it back, compares and reports."""
    target = _target(arguments)
    require("flatbuffers", purpose="export")  # JAX imports it to write the file
    batch_size, platforms = _batch_size(_BATCH.value), _PLATFORMS.value
    config = _portable(shared_flags.read_config(_CONFIG))
    json_file = Path(_JSON.value or target.with_name(f"{target.name}.json"))
    _check_files(target, json_file)
    images = _images(config, batch_size or CHECKED)
    model = shared_flags.load_model(_CHECKPOINT.value, config)
    normalize = _normalize(config.data)
    inside = normalize if _NORMALIZE.value else None

    from top_jax.convert import stablehlo

    with terminal.progress(f"exporting {config.model.name}", len(STEPS)) as advance:
        exported = stablehlo.export_model(model, batch_size=batch_size, platforms=platforms, normalize=inside)
        advance(1)
        with files.requested_file(target) as temporary:
            temporary.write_bytes(exported.serialize())
            advance(1)
            again = export.deserialize(bytearray(temporary.read_bytes()))
            inputs = images if inside else np.asarray(normalize(images))
            parity = stablehlo.largest_difference(model, again, inputs, normalize=inside)
            _check(parity, target)
            advance(1)
        if _STABLEHLO.value:
            stablehlo.write_module(again, _STABLEHLO.value)
    report = _report(config, again, target, parity)
    _print(report)
    files.save_json(json_file, report)


def _target(arguments: list[str]) -> Path:
    if len(arguments) != 1:
        raise InputError(f"got {len(arguments)} arguments; needed: OUT, the file to write (--help).")
    return Path(arguments[0])


def _batch_size(text: str) -> int | None:
    if text == "symbolic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"--batch={text}; needed: the number of images per call, at least 1, or `symbolic` for any number."
        )
    return int(text)


def _portable(config: RunConfig) -> RunConfig:
    """Returns the config with the implementation of the scan that is pure StableHLO; DeiT has no scan."""
    from top_jax.build import build_sizes
    from top_jax.convert.stablehlo import IMPLEMENTATION
    from top_jax.models.sizes import MambaConfig

    if not isinstance(build_sizes(config.model), MambaConfig):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, implementation=IMPLEMENTATION))


def _check_files(target: Path, json_file: Path) -> None:
    """Raises InputError if a file cannot be written, before any work that would be lost."""
    from top_jax.convert.stablehlo import check_module, check_platforms

    check_platforms(_PLATFORMS.value)
    targets = [target, json_file]
    if _STABLEHLO.value:
        check_module(_STABLEHLO.value, _PLATFORMS.value, _batch_size(_BATCH.value))
        targets.append(Path(_STABLEHLO.value))
    if len({file.absolute() for file in targets}) < len(targets):
        raise InputError(f"{', '.join(map(str, targets))} must be different files; rename one of them.")
    for file in targets:
        if file.is_dir() or not file.parent.is_dir():
            problem = "is a directory" if file.is_dir() else "is in a directory that does not exist"
            raise InputError(f"{file} {problem}; choose another path.")
        if file.exists() and not _OVERWRITE.value:
            raise InputError(f"{file} exists; choose another name, or pass --overwrite.")
        files.check_folder(file.parent, str(file))


def _images(config: RunConfig, count: int) -> np.ndarray:
    """Returns the images to compare on, uint8 `[count, H, W, 3]`."""
    from top_jax.build import build_sizes

    size = build_sizes(config.model).img_size
    if _IMAGES.value == "data" and config.model.is_segmenter:
        raise InputError(
            "--images=data works for classifiers only; leave it out: a segmenter is compared on random pixels."
        )
    if _IMAGES.value == "random":
        return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)

    from top_jax.data.examples import ExampleReader
    from top_jax.training.class_names import class_order

    source = shared_flags.open_evaluation(config, "compare on the data it was trained for")
    kept = _class_names(config)
    if class_order(source.class_names, kept=kept, origin=_CHECKPOINT.value) is not None:
        logging.warning("the data's classes are in another order; the logits keep the order of %s", _CHECKPOINT.value)
    reader = ExampleReader(source, config.data, size)
    return np.stack([reader.fixed(index)["image"] for index in range(count)])


def _normalize(data: DataConfig) -> Callable[[Any], jax.Array]:
    from top_jax.data import normalize

    return functools.partial(normalize, mean=data.mean, std=data.std)


def _check(parity: list[Any], target: Path) -> None:
    """Raises RunError if the exported model differs from the model."""
    for result in parity:
        if not result.max_rel <= _TOLERANCE.value:  # `not`, so that nan is a difference
            raise RunError(
                f"{target} is not written: on {result.platform}, its logits for {result.batch_size} images differ from "
                f"the model's by {result.max_rel:.1e} of the largest, more than --tolerance={_TOLERANCE.value:g}; on a "
                "GPU, whose float32 products are rounded, try JAX_DEFAULT_MATMUL_PRECISION=highest."
            )


def _class_names(config: RunConfig) -> tuple[str, ...] | None:
    """Returns the names of the checkpoint's classes; None if they are not known."""
    from top_jax.training.saved_weights import find_weights

    return find_weights(_CHECKPOINT.value, config.model.name).class_names(config.model.num_classes)


def _report(config: RunConfig, exported: Any, target: Path, parity: list[Any]) -> dict[str, Any]:
    """Returns the content of the JSON file."""
    argument, result = exported.in_avals[0], exported.out_avals[0]
    names = _class_names(config)
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "stablehlo": _STABLEHLO.value,
        "model": config.model.name,
        "checkpoint": _CHECKPOINT.value,
        "config": dataclasses.asdict(config.model),
        "pruning": config.pruning.settings(),
        "input": {
            "shape": [size if isinstance(size, int) else str(size) for size in argument.shape],
            "dtype": argument.dtype.name,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "normalization_inside": _NORMALIZE.value,
        },
        "output": {"shape": [str(result.shape[0]), *result.shape[1:]], "dtype": result.dtype.name},
        "class_names": None if names is None else list(names),  # in the order of the logits
        "platforms": list(exported.platforms),
        "parity": [one._asdict() for one in parity],
        "parity_images": _IMAGES.value,
        "tolerance": _TOLERANCE.value,
        "not_checked": sorted(set(exported.platforms) - {one.platform for one in parity}),
        "calling_convention_version": exported.calling_convention_version,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def _print(report: dict[str, Any]) -> None:
    shape = ", ".join(map(str, report["input"]["shape"]))
    pixels = "pixels" if report["input"]["normalization_inside"] else "normalised"
    print(f"{report['checkpoint']} ({report['model']}) -> {report['file']}, {report['bytes'] / 1e6:.2f} MB")
    print(f"input       {report['input']['dtype']} [{shape}], {pixels}")
    print(f"platforms   {', '.join(report['platforms'])}")
    for one in report["parity"]:
        where = f"{one['platform']}, batch {one['batch_size']}"
        print(
            f"parity      {where}: largest difference {one['max_abs']:.1e}, {one['max_rel']:.1e} of the largest logit"
        )
    if report["not_checked"]:
        print(f"not checked {', '.join(report['not_checked'])}: this machine has no such device")


if __name__ == "__main__":
    runner.run(main)
