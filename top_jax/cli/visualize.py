"""Draws the effect of pruning on images (kept tokens, scores, scan paths, hidden attention), and segmentations.

top-jax visualize --config configs/vim_s_top.py --checkpoint runs/a photo.jpg --out pictures
top-jax visualize --config configs/vim_digits_top.py --checkpoint runs/a --examples=2 --out pictures

For a segmenter it draws labels, prediction, overlay, kept tokens and errors. For each image the command writes a PNG
and a .npz with all arrays. index.json explains the arrays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import flags

from top_jax import files
from top_jax.cli import runner, shared_flags, terminal
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.optional import require

if TYPE_CHECKING:
    from top_jax.data import Source
    from top_jax.figures.photo import Picture
    from top_jax.models import Backbone, Segmenter

_CONFIG, _CHECKPOINT = shared_flags.define_config(), shared_flags.define_checkpoint()
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures; created if it does not exist.", required=True)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "Draw N images of the config's evaluation split, evenly spread, instead of IMAGE...", lower_bound=0
)
_DRAW = flags.DEFINE_list(
    "draw", ["tokens", "scores", "paths", "attention"], "What to draw: any of tokens, scores, paths, attention."
)
_BLOCKS = flags.DEFINE_list(
    "blocks", None, "Blocks whose attention is drawn, from 1; by default the last block before the first reduction "
    "and the last block."
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Runs the model on each image (a classifier once per variant), draws, and writes the index."""
    config, checkpoint, out = shared_flags.read_config(_CONFIG), _CHECKPOINT.value, Path(_OUT.value)
    _check_drawn()
    files.check_folder(out, f"--out={out}")
    require("matplotlib", purpose="visualize")
    pictures, source = _pictures(arguments, config)  # before the model, which takes longer
    class_names = None if source is None else source.class_names
    labels = _label_maps(pictures, source, config) if config.model.is_segmenter else []
    model = shared_flags.load_model(checkpoint, config, class_names)
    class_names = class_names or _names_of(checkpoint, config)
    from top_jax.figures.sheet import as_class, describe_reduction
    from top_jax.models import Segmenter

    if isinstance(model, Segmenter):
        index = _segment(model, config, pictures, labels, class_names)
    else:
        index = _examine(model, config, pictures, class_names)
    about = {"checkpoint": str(checkpoint), "model": config.model.name, "pruning": describe_reduction(model.reduction)}
    for sheet in index["images"]:
        if "classes" in sheet:
            result = ", ".join(f"{name} {share:.0%}" for name, share in list(sheet["classes"].items())[:3])
        else:
            result = f"predicted {as_class(sheet['prediction'])} ({100 * sheet['probability']:.0f} %)"
        print(f"{out / sheet['png']}: {result}")
    files.save_json(out / "index.json", {**about, **index})
    print(f"{out / 'index.json'} says what the arrays in the .npz files are.")


def _segment(
    model: Segmenter, config: RunConfig, pictures: list[Picture], labels: list[Any], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Draws labels, prediction and remaining tokens of each image; returns their part of the index."""
    import numpy as np

    from top_jax.data import prepare_image
    from top_jax.figures.segmentation import ARRAYS, draw_segmentation, make_segment

    about = f"{config.model.name} with UPerNet, {model.inference} inference, from {_CHECKPOINT.value}"
    options = {"about": about, "class_names": class_names}
    segment, sheets = make_segment(model), []
    with terminal.progress("running and drawing", len(pictures)) as advance:
        for stem, picture, label in zip(_stems(pictures), pictures, labels, strict=True):
            pixels = np.asarray(picture.image)
            found = segment(prepare_image(pixels, config.data), (pixels.shape[0], pixels.shape[1]))
            sheets.append(draw_segmentation(stem, picture.name, pixels, label, found, model, **options))
            advance(1)
    return {"fill": model.fill, "device": jax.devices()[0].device_kind, "images": sheets, "arrays": ARRAYS}


def _examine(
    model: Backbone, config: RunConfig, pictures: list[Picture], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Draws what a classifier's reduction does to each image; returns its part of the index."""
    from top_jax.data import preprocess
    from top_jax.figures.examine import ARRAYS, examiner, name_of, variants_of
    from top_jax.figures.photo import crop_for_display
    from top_jax.figures.sheet import describe_reduction, draw_sheet

    data, blocks = config.data, _blocks(model)
    (height, width), patch = model.config.img_size, model.config.patch_size
    about = f"{config.model.name} at {height} x {width} pixels, patches of {patch}, from {_CHECKPOINT.value}"
    options = {"about": about, "class_names": class_names, "kinds": tuple(_DRAW.value)}
    compared = {"paths", "attention"} & set(_DRAW.value)
    variants = variants_of(model) if compared else {name_of(model.reduction): model.reduction}
    sheets = []
    with terminal.progress("running and drawing", len(pictures) * len(variants)) as advance:
        examine = examiner(model, variants, blocks, on_pass=advance)
        for stem, picture in zip(_stems(pictures), pictures, strict=True):
            size, crop = model.config.img_size, data.eval_crop
            examination = examine(preprocess(picture.image, size, eval_crop=crop, mean=data.mean, std=data.std))
            photo = crop_for_display(picture.image, model.config, eval_crop=crop)
            sheets.append(draw_sheet(stem, picture, photo, examination, model, **options))
    return {
        "variants": {name: describe_reduction(reduction) for name, reduction in variants.items()},
        "attention_of_blocks": list(blocks),
        "device": jax.devices()[0].device_kind,
        "images": sheets,
        "arrays": ARRAYS,
    }


def _stems(pictures: list[Picture]) -> list[Path]:
    """Makes the folder; returns the path of each picture's files in it, without a suffix."""
    from top_jax.figures.photo import stems_of

    folder = Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    return [folder / stem for stem in stems_of(pictures)]


def _label_maps(pictures: list[Picture], source: Source | None, config: RunConfig) -> list[Any]:
    """Returns the label maps of the pictures, uint8 `[H, W]` each; None for files, which have none."""
    if source is None:
        return [None] * len(pictures)
    from top_jax.build import crop_size
    from top_jax.data.pipeline import reader_of
    from top_jax.data.segmentation import SegmentationReader

    reader = reader_of(source, config.data, crop_size(config))
    assert isinstance(reader, SegmentationReader)
    return [reader.pixels(picture.place)[1] for picture in pictures if picture.place is not None]


def _pictures(files: list[str], config: RunConfig) -> tuple[list[Picture], Source | None]:
    """Returns the pictures to draw, and the source that they come from; None for files."""
    from top_jax.figures.photo import of_files, of_source

    if bool(files) == bool(_EXAMPLES.value):
        came = f"{len(files)} images and --examples={_EXAMPLES.value}"
        raise InputError(f"got {came}; needed: either image files, or --examples=N with N from 1.")
    if files:
        return of_files(files, **config.data.decoding()), None
    source = shared_flags.open_evaluation(config, "draw images of the data it was trained for")
    return of_source(source, _EXAMPLES.value, **config.data.decoding()), source


def _names_of(checkpoint: str, config: RunConfig) -> tuple[str, ...]:
    """Returns the class names that the checkpoint keeps, or those of the config's data if it keeps none."""
    from top_jax.data import open_source
    from top_jax.training.saved_weights import find_weights

    names = find_weights(checkpoint, config.model.name).class_names(config.model.num_classes)
    if names is not None:
        return names
    try:
        shared_flags.check_data_is_known()
        names = open_source(config.data, train=False).class_names
    except InputError:  # photos need no dataset; without it, classes have no names
        names = ()
    if len(names) != config.model.num_classes:
        names = tuple(f"class {label}" for label in range(config.model.num_classes))
    return names


def _check_drawn() -> None:
    from top_jax.figures.sheet import KINDS

    unknown = [kind for kind in _DRAW.value if kind not in KINDS]
    if unknown or not _DRAW.value:
        raise InputError(f"--draw={','.join(_DRAW.value)}; choose from {', '.join(KINDS)}.")


def _blocks(model: Backbone) -> tuple[int, ...]:
    """Returns the blocks whose attention is drawn."""
    from top_jax.figures.examine import blocks_to_see

    if "attention" not in _DRAW.value:
        return ()
    if _BLOCKS.value is None:
        return blocks_to_see(model)
    known = {str(number): number for number in range(1, model.config.depth + 1)}
    if unknown := [block for block in _BLOCKS.value if block not in known]:
        raise InputError(f"--blocks={unknown[0]}; this model has the blocks 1 to {model.config.depth}.")
    return tuple(sorted({known[block] for block in _BLOCKS.value}))


if __name__ == "__main__":
    runner.run(main)
