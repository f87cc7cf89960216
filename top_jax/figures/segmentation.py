"""A segmenter's sheet for one image: labels, prediction, overlay with a legend, remaining tokens, errors."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.data import IGNORED
from top_jax.evaluation.segmentation import make_predict
from top_jax.figures.page import INK, Panel, Section, draw_photo
from top_jax.figures.photo import Photo
from top_jax.figures.sheet import describe_reduction, write_sheet
from top_jax.models import Segmenter
from top_jax.models.backbone import BlockRun
from top_jax.models.features import make_features
from top_jax.models.sliding import cut_windows, window_starts
from top_jax.models.weights import weights_of
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

LEGEND: Final = 16  # classes in a legend; the rest are counted
GREY: Final = 170
ARRAYS: Final = {
    "photo": "uint8 [H, W, 3]: the image, at its own size",
    "prediction": "int32 [H, W]: class of each pixel",
    "label": "uint8 [H, W]: the labels, 255 where none; absent if they are not known",
    "kept/BLOCK": "float32 [h, w]: after the reduction of that block, whether a pixel's patch still has a token, "
    "averaged over the windows that the pixel lies in; at the size that the model saw",
}
"""The arrays of a .npz by name."""


class Segmented(NamedTuple):
    """Result of a segmenter for one image.

    Attributes:
        prediction: int32 `[H, W]`, at the photo's own size.
        kept: float32 `[h, w]` for each block with a reduction, as in `ARRAYS`; h and w are those of the model's input.
        tokens: for each of these blocks, the number of a window's tokens after the reduction, and of all its tokens.
    """

    prediction: np.ndarray
    kept: dict[int, np.ndarray]
    tokens: dict[int, tuple[int, int]]


def make_segment(model: Segmenter) -> Callable[[np.ndarray, tuple[int, int]], Segmented]:
    """Builds `segment(image, size)` for a normalised image float32 `[h, w, 3]`; `size` is that of the labels."""
    predict, stages = make_predict(model), jax.jit(_stages)

    def segment(image: np.ndarray, size: tuple[int, int]) -> Segmented:
        image_size = (image.shape[0], image.shape[1])
        crop = model.config.backbone.img_size if model.inference == "slide" else image_size
        kept: dict[int, np.ndarray] = {}
        tokens: dict[int, tuple[int, int]] = {}
        count = np.zeros(image_size, np.float32)
        images = jnp.asarray(image)[None]
        starts = window_starts(image_size, crop, model.slide_stride)
        for (top, left), window in zip(starts, cut_windows(images, crop, model.slide_stride), strict=True):
            place = np.s_[top : top + crop[0], left : left + crop[1]]
            count[place] += 1
            for block, grid in stages(model, window).items():
                cells = np.asarray(grid[0])
                pixels = np.kron(cells >= 0, np.ones((-(-crop[0] // len(cells)), -(-crop[1] // len(cells[0])))))
                kept.setdefault(block, np.zeros(image_size, np.float32))[place] += pixels[
                    : min(crop[0], image_size[0] - top), : min(crop[1], image_size[1] - left)
                ]
                tokens[block] = (len(np.unique(cells[cells >= 0])), cells.size)
        prediction = np.asarray(predict(weights_of(model), images, size))[0]
        return Segmented(prediction, {block: total / count for block, total in kept.items()}, tokens)

    return segment


def _stages(model: Segmenter, images: jax.Array) -> dict[int, jax.Array]:
    """Returns the token that represents each patch after each reduction, int32 `[B, rows, columns]`, -1 for none."""
    cut, found = {cut.block for cut in model.backbone.schedule}, {}

    def watch(run: BlockRun) -> None:
        if run.number in cut:
            grid = run.leaving.grid or model.config.backbone.grid
            source = make_features(run.leaving, grid).source
            found[run.number] = source.reshape(len(source), *grid)

    model.backbone.features(images, watch=watch)
    return found


def draw_segmentation(
    stem: Path,
    name: str,
    pixels: np.ndarray,
    label: np.ndarray | None,
    found: Segmented,
    model: Segmenter,
    *,
    about: str,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Writes `stem`.png and `stem`.npz (see `ARRAYS`).

    Args:
        stem: path of both files, without a suffix.
        name: name of the image on the page.
        pixels: the photo, uint8 `[H, W, 3]`.
        label: uint8 `[H, W]`, `IGNORED` where there is none; None if the labels are not known.
        found: what `make_segment`'s function returned.
        model: the model as configured.
        about: the model in words; its reduction is added.
        class_names: the name of each class.

    Returns:
        The sheet's entry in an index of sheets: JSON values.

    Raises:
        OSError: the files cannot be written.
    """
    height, width = pixels.shape[:2]
    photo = Photo(pixels, (height, width), (1, 1), max(height, width), max(height, width))
    colours = palette(len(class_names))
    shares = np.bincount(found.prediction.ravel(), minlength=len(class_names)) / found.prediction.size
    present = [int(one) for one in np.argsort(-shares, kind="stable") if shares[one]]
    sections = [_labels_section(photo, label, found.prediction, colours, present, class_names)]
    if found.kept:
        sections.append(_kept_section(photo, found))
    title = name
    entry: dict[str, Any] = {"image": name, "classes": {class_names[one]: float(shares[one]) for one in present}}
    if label is not None and (label != IGNORED).any():
        entry["pixel_accuracy"] = float(np.mean((found.prediction == label)[label != IGNORED]))
        title += f": {entry['pixel_accuracy']:.1%} of the labelled pixels right"
    subtitle = f"{about}; {describe_reduction(model.reduction)}; fill '{model.fill}'."
    arrays = {"prediction": found.prediction, **{f"kept/{block}": kept for block, kept in found.kept.items()}}
    arrays |= {} if label is None else {"label": label}
    tokens = {str(block): left for block, (left, _) in found.tokens.items()}
    return {**entry, **write_sheet(stem, title, subtitle, photo, sections, arrays), "tokens": tokens}


def palette(count: int) -> np.ndarray:
    """Returns a colour for each class, uint8 `[count, 3]`; consecutive classes differ in hue and saturation."""
    golden = 0.61803398875
    colours = [
        colorsys.hsv_to_rgb((i * golden) % 1, (0.75, 0.5, 0.95)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3])
        for i in range(count)
    ]
    return (255 * np.array(colours)).astype(np.uint8).reshape(count, 3)


def _coloured(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    known = labels < len(colours)
    return np.where(known[..., None], colours[np.where(known, labels, 0)], np.uint8(GREY))


def _labels_section(
    photo: Photo,
    label: np.ndarray | None,
    prediction: np.ndarray,
    colours: np.ndarray,
    present: list[int],
    class_names: Sequence[str],
) -> Section:
    def picture(title: str, pixels: np.ndarray) -> Panel:
        return Panel(title, functools.partial(draw_photo, photo=photo._replace(pixels=pixels.astype(np.uint8))))

    predicted = _coloured(prediction, colours)
    panels = [picture("photo", photo.pixels)]
    note = "The legend lists the classes of the prediction, the largest first."
    if label is not None:
        panels.append(picture("labels", _coloured(label, colours)))
        note = f"{note} Grey: not labelled."
    panels += [
        picture("prediction", predicted),
        picture("prediction on the photo", 0.45 * photo.pixels + 0.55 * predicted),
        Panel("classes", functools.partial(_legend, photo, colours, present, class_names)),
    ]
    if label is not None:
        wrong = (label != IGNORED) & (prediction != label)
        pale = photo.pixels * 0.25 + 255 * 0.75
        errors = np.where(wrong[..., None], (213, 94, 0), np.where((label == IGNORED)[..., None], GREY, pale))
        panels.append(picture("errors", errors))
    return Section("Segmentation", note, [panels])


def _kept_section(photo: Photo, found: Segmented) -> Section:
    panels = []
    for block, kept in found.kept.items():
        left, of = found.tokens[block]
        title = f"after block {block}: {left} of {of} tokens"
        panels.append(Panel(title, functools.partial(_kept, photo, kept)))
    note = "Patches in colour still have a token; where windows overlap, the share of them that kept it."
    return Section("Remaining tokens", note, [panels])


def _kept(photo: Photo, kept: np.ndarray, axes: Axes) -> None:
    rows, columns = (
        np.minimum((np.arange(side) + 0.5) * old / side, old - 1).astype(int)
        for side, old in zip(photo.size, kept.shape, strict=True)
    )
    draw_photo(axes, photo, dropped=1 - kept[rows[:, None], columns[None, :]])


def _legend(photo: Photo, colours: np.ndarray, present: list[int], names: Sequence[str], axes: Axes) -> None:
    height, width = photo.size
    shown = present[:LEGEND]
    step = height / (len(shown) + 1 + (len(present) > LEGEND))
    for row, one in enumerate(shown):
        top = (row + 0.5) * step
        box = Rectangle((0.04 * width, top), 0.08 * width, 0.7 * step, facecolor=tuple(colours[one] / 255), linewidth=0)
        axes.add_patch(box)
        axes.text(0.16 * width, top + 0.35 * step, names[one], size=6.5, color=INK, va="center", parse_math=False)
    if len(present) > LEGEND:
        axes.text(0.16 * width, height - 0.6 * step, f"and {len(present) - LEGEND} more", size=6.5, color=INK)
