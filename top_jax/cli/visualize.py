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
    from top_jax.models import Backbone

_CONFIG, _CHECKPOINT = shared_flags.define_config(), shared_flags.define_checkpoint()
flags.adopt_module_key_flags(shared_flags)  # so that --help shows them
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
    """Runs the model once per variant and image, draws, and writes the index."""
    config, checkpoint, out = shared_flags.read_config(_CONFIG), _CHECKPOINT.value, Path(_OUT.value)
    _check_drawn()
    files.check_folder(out, f"--out={out}")
    require("matplotlib", purpose="visualize")
    if config.model.is_segmenter:
        _visualize_segmenter(config, arguments)
        return
    from top_jax.build import as_classifier

    pictures, source = _pictures(arguments, config)  # before the model, which takes longer
    class_names = None if source is None else source.class_names
    model = as_classifier(shared_flags.load_model(checkpoint, config, class_names), "visualize")
    class_names = class_names or _names_of(checkpoint, config)
    from top_jax.figures.sheet import as_class

    index = visualize(model, config, pictures, class_names, checkpoint=checkpoint, out=out)
    for image in index["images"]:
        print(f"{out / image['png']}: predicted {as_class(image['prediction'])} ({100 * image['probability']:.0f} %)")
    _write_index(out, index)


def _visualize_segmenter(config: RunConfig, images: list[str]) -> None:
    """Draws labels, prediction and remaining tokens of each image, and writes the index."""
    import numpy as np

    from top_jax.data import prepare_image
    from top_jax.figures.photo import stems_of
    from top_jax.figures.segmentation import ARRAYS, draw_segmentation, make_segment
    from top_jax.figures.sheet import describe_reduction
    from top_jax.models import Segmenter

    out, checkpoint = Path(_OUT.value), _CHECKPOINT.value
    pictures, source = _pictures(images, config)
    class_names = None if source is None else source.class_names
    labels = [None] * len(pictures) if source is None else _label_maps(pictures, source, config)
    model = shared_flags.load_model(checkpoint, config, class_names)
    assert isinstance(model, Segmenter)
    class_names = class_names or _names_of(checkpoint, config)
    about = f"{config.model.name} with UPerNet, {model.inference} inference, from {checkpoint}"
    _make_folder(out)
    segment, sheets = make_segment(model), []
    with terminal.progress("running and drawing", len(pictures)) as advance:
        for stem, picture, label in zip(stems_of(pictures), pictures, labels, strict=True):
            pixels = np.asarray(picture.image)
            found = segment(prepare_image(pixels, config.data), (pixels.shape[0], pixels.shape[1]))
            options = {"about": about, "class_names": class_names}
            sheets.append(draw_segmentation(out / stem, picture.name, pixels, label, found, model, **options))
            advance(1)
    index = {
        "checkpoint": str(checkpoint),
        "model": config.model.name,
        "pruning": describe_reduction(model.reduction),
        "fill": model.fill,
        "device": jax.devices()[0].device_kind,
        "images": sheets,
        "arrays": ARRAYS,
    }
    for sheet in sheets:
        largest = ", ".join(f"{name} {share:.0%}" for name, share in list(sheet["classes"].items())[:3])
        print(f"{out / sheet['png']}: {largest}")
    _write_index(out, index)


def _label_maps(pictures: list[Any], source: Source, config: RunConfig) -> list[Any]:
    """Returns the label maps of pictures that come from a source, uint8 `[H, W]` each."""
    from top_jax.build import crop_size
    from top_jax.data.pipeline import reader_of
    from top_jax.data.segmentation import SegmentationReader
    from top_jax.training.prepare import check_labels

    check_labels(source, config)
    reader = reader_of(source, config.data, crop_size(config))
    assert isinstance(reader, SegmentationReader)
    return [reader.pixels(picture.place)[1] for picture in pictures]


def visualize(
    model: Backbone,
    config: RunConfig,
    pictures: list[Any],
    class_names: tuple[str, ...],
    *,
    checkpoint: str | Path,
    out: Path,
) -> dict[str, Any]:
    """Draws the pictures into a folder and returns their index."""
    from top_jax.data import preprocess
    from top_jax.figures.examine import examiner, name_of, variants_of
    from top_jax.figures.photo import crop_for_display, stems_of
    from top_jax.figures.sheet import ARRAYS, Subject, describe_reduction, draw_sheet

    data, blocks = config.data, _blocks(model)
    (height, width), patch = model.config.img_size, model.config.patch_size
    about = f"{config.model.name} at {height} x {width} pixels, patches of {patch}, from {checkpoint}"
    _make_folder(out)
    compared = {"paths", "attention"} & set(_DRAW.value)
    variants = variants_of(model) if compared else {name_of(model.reduction): model.reduction}
    images = []
    with terminal.progress("running and drawing", len(pictures) * len(variants)) as advance:
        examine = examiner(model, variants, blocks, on_pass=advance)
        for stem, picture in zip(stems_of(pictures), pictures, strict=True):
            image = picture.image
            pixels = preprocess(image, model.config.img_size, eval_crop=data.eval_crop, mean=data.mean, std=data.std)
            photo = crop_for_display(image, model.config, eval_crop=data.eval_crop)
            subject = Subject(picture.name, photo, picture.label)
            sheet = draw_sheet(
                out / stem,
                subject,
                examine(pixels),
                model,
                about=about,
                class_names=class_names,
                kinds=tuple(_DRAW.value),
            )
            images.append(sheet)
    return {
        "checkpoint": str(checkpoint),
        "model": config.model.name,
        "pruning": describe_reduction(model.reduction),
        "variants": {name: describe_reduction(reduction) for name, reduction in variants.items()},
        "attention_of_blocks": list(blocks),
        "device": jax.devices()[0].device_kind,
        "images": images,
        "arrays": ARRAYS,
    }


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out} cannot be created ({error.strerror}); choose another.") from error


def _write_index(out: Path, index: dict[str, Any]) -> None:
    files.save_json(out / "index.json", index)
    print(f"{out / 'index.json'} says what the arrays in the .npz files are.")


def _pictures(files: list[str], config: RunConfig) -> tuple[list[Any], Source | None]:
    """Returns the `Picture`s to draw, and the source that they come from; None for files."""
    from top_jax.data import check_classes, open_source
    from top_jax.figures.photo import of_files, of_source

    if bool(files) == bool(_EXAMPLES.value):
        came = f"{len(files)} images and --examples={_EXAMPLES.value}"
        raise InputError(f"got {came}; needed: either image files, or --examples=N with N from 1.")
    if files:
        return of_files(files, **config.data.decoding()), None
    shared_flags.check_data_is_known()
    source = open_source(config.data, train=False)
    check_classes(source, config.model.num_classes, "draw images of the data it was trained for")
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
