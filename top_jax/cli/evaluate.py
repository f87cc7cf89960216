"""Evaluates a checkpoint on its config's evaluation split, counting every image once.

top-jax evaluate --config configs/vim_s_top.py --checkpoint runs/a
top-jax evaluate --config configs/vim_s_top.py --checkpoint vim_s.pth
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import flags, logging

from top_jax import distributed, files
from top_jax.cli import runner, shared_flags, terminal
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.optional import require

if TYPE_CHECKING:
    from top_jax.build import Model
    from top_jax.data import Source

_CONFIG, _CHECKPOINT = shared_flags.define_config(), shared_flags.define_checkpoint()
shared_flags.define_distributed()
_JSON = flags.DEFINE_string("json", None, "File for the result; by default next to the checkpoint.")


def main(arguments: list[str]) -> None:
    """Evaluates the checkpoint, prints the result and writes it as JSON."""
    runner.no_more(arguments)
    config = shared_flags.read_config(_CONFIG)
    runner.check_json(_JSON.value, Path(_CHECKPOINT.value))
    shared_flags.join_processes()
    result = evaluate_checkpoint(config, _CHECKPOINT.value)
    if distributed.is_primary():
        classes = result.get("classes")
        print(json.dumps({name: value for name, value in result.items() if name != "classes"}, indent=2))
        if classes:
            _show_worst(classes)
        try:
            files.save_json(_JSON.value or _beside(_CHECKPOINT.value), result)
        except InputError as error:  # next to the checkpoint, which may be on a read-only disk
            if _JSON.value:
                raise
            logging.warning("the result is printed only: %s", error)


def evaluate_checkpoint(config: RunConfig, checkpoint: str | Path) -> dict[str, Any]:
    """Returns the accuracy and cost of a checkpoint with the config's model, pruning and data."""
    from top_jax.evaluation.flops.of_config import costs
    from top_jax.training.saved_weights import find_weights

    require("grain", purpose="evaluate")
    source = shared_flags.open_evaluation(config, "evaluate it on the data it was trained for")
    model = shared_flags.load_model(checkpoint, config, source.class_names)
    with terminal.progress(f"evaluating on {source.name}", len(source)) as advance:
        result = _evaluate(model, source, config, advance)
    return {
        "checkpoint": str(checkpoint),
        **find_weights(checkpoint, config.model.name).about(flags.FLAGS.which, flags.FLAGS.ema),
        "data": source.name,
        **result,
        **costs(config),
        "device": jax.devices()[0].device_kind,
    }


def _evaluate(model: Model, source: Source, config: RunConfig, advance: Callable[[int], None]) -> dict[str, Any]:
    from top_jax.build import crop_size
    from top_jax.evaluation.accuracy import evaluate_model
    from top_jax.evaluation.segmentation import evaluate_segmenter
    from top_jax.models import Segmenter

    batch_size = config.eval_batch_size or config.batch_size
    if isinstance(model, Segmenter):
        options = {"batch_size": batch_size, "crop_size": crop_size(config), "on_batch": advance}
        return evaluate_segmenter(model, source, config.data, **options)
    return evaluate_model(model, source, config.data, batch_size=batch_size, on_batch=advance)


def _show_worst(classes: list[dict[str, Any]]) -> None:
    """Prints the ten classes with the lowest IoU, of those that occur."""
    found = sorted((one for one in classes if one["iou"] is not None), key=lambda one: one["iou"])
    table = terminal.Table("worst classes", "IoU", "accuracy", "share of pixels")
    for one in found[:10]:
        right = "-" if one["accuracy"] is None else f"{one['accuracy']:.1%}"
        table.add_row(one["name"], f"{one['iou']:.1%}", right, f"{one['share']:.2%}")
    table.show()


def _beside(checkpoint: str) -> Path:
    """Returns the path of the result: runs/a/evaluation.json for runs/a, vim_s.pth.evaluation.json for vim_s.pth.

    For a name it is a file in the current folder, vim_small.evaluation.json for pretrained:vim_small.
    """
    from top_jax.convert.hub import label_of

    run = Path(checkpoint) / "evaluation.json"
    return run if Path(checkpoint).is_dir() else Path(f"{label_of(checkpoint)}.evaluation.json")


if __name__ == "__main__":
    runner.run(main)
