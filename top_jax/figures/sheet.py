"""One image's sheet: all of its pictures in one PNG, and all of their arrays in one .npz."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.examine import Arrays, Examination, arrays_of
from top_jax.figures.page import Section, draw_page
from top_jax.figures.photo import Photo, Picture
from top_jax.figures.sections import attention_section, kept_section, paths_section, scores_section
from top_jax.files import write_arrays
from top_jax.models import Backbone, Deit
from top_jax.pruning import Evit, Merging, Pruning, Reduction

KINDS: Final = ("tokens", "scores", "paths", "attention")
"""The sections of a sheet."""


def draw_sheet(
    stem: Path,
    picture: Picture,
    photo: Photo,
    examination: Examination,
    model: Backbone,
    *,
    about: str,
    class_names: tuple[str, ...],
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Any]:
    """Writes `stem`.png and `stem`.npz (see `top_jax.figures.examine.ARRAYS`).

    Args:
        stem: path of both files, without a suffix.
        picture: the image.
        photo: the part of it that the model sees.
        examination: its forward passes.
        model: the model as configured.
        about: the model in words; its reduction is added.
        class_names: the name of each label.
        kinds: the sections to draw, out of `KINDS`. All arrays that were computed are written in any case.

    Returns:
        The sheet's entry in an index of sheets: JSON values.

    Raises:
        OSError: the files cannot be written.
    """
    arrays = arrays_of(examination, model.config.num_patches)
    sections = {"tokens": kept_section(arrays, photo, merges=isinstance(model.reduction, Merging))}
    if "scores" in arrays:
        sections["scores"] = scores_section(arrays, photo, score=str(model.reduction.needed_evidence))
    if any(name.startswith("path/") for name in arrays):
        sections["paths"] = paths_section(arrays, photo)
    if examination.blocks:
        sections["attention"] = attention_section(arrays, photo, scans=not isinstance(model, Deit))
    prediction = _prediction(arrays["logits"], picture.label, class_names)
    predicted, share = as_class(prediction["prediction"]), 100 * prediction["probability"]
    title = f"{picture.name}: predicted {predicted} ({share:.0f} %)"
    if prediction["label"] is not None:
        title += f", labelled {as_class(prediction['label'])}"
    subtitle = f"{about}; {describe_reduction(model.reduction)}."
    chosen = [section for kind, section in sections.items() if kind in kinds]
    tokens = zip(arrays["after_blocks"], arrays["tokens"], strict=True)
    return {
        "image": picture.name,
        **write_sheet(stem, title, subtitle, photo, chosen, {"grid": np.array(photo.grid), **arrays}),
        **prediction,
        "predictions": {name: class_names[one.logits[0].argmax()] for name, one in examination.traces.items()},
        "tokens": {str(block): int(count) for block, count in tokens},
        "class_token": bool((examination.own.blocks[1].places == CLASS).any()),
    }


def write_sheet(
    stem: Path, title: str, subtitle: str, photo: Photo, sections: Sequence[Section], arrays: Arrays
) -> dict[str, str]:
    """Writes `stem`.png, and `stem`.npz with the photo and other arrays; returns their names, for an index of sheets.

    Raises:
        OSError: the files cannot be written.
    """
    png, npz = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "npz"))
    draw_page(png, title, subtitle, photo, sections)
    write_arrays(npz, {"photo": photo.pixels, **arrays})
    return {"png": png.name, "npz": npz.name}


def describe_reduction(reduction: Reduction) -> str:
    """Returns one line of text that describes a reduction."""
    if not reduction.after_blocks:
        return "dense"
    verb = {Merging: "merged", Evit: "pruned by EViT"}.get(type(reduction), "pruned")
    ratios = reduction.ratios[:1] if len(set(reduction.ratios)) == 1 else reduction.ratios
    shares = ", ".join(f"{100 * ratio:g}" for ratio in ratios)
    several = len(reduction.after_blocks) > 1
    blocks = f"{'blocks' if several else 'block'} {', '.join(map(str, reduction.after_blocks))}"
    text = f"{verb} after {blocks} to {shares} %{' each time' if several and len(ratios) == 1 else ''}"
    if reduction.needed_evidence is not None:
        text += f", score '{reduction.needed_evidence}'"
    if isinstance(reduction, Pruning | Evit) and reduction.order != "position":
        text += f", in {reduction.order} order"
    return f"{text}, alignment '{reduction.alignment}'"


def as_class(name: str) -> str:
    """Returns a class's name for a sentence: `class 3` for a name that is a number."""
    return f"class {name}" if name.isdecimal() else name


def _prediction(logits: np.ndarray, label: int | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    shares = np.exp(logits - logits.max())
    best = int(np.argmax(logits))
    return {
        "prediction": class_names[best],
        "probability": float(shares[best] / shares.sum()),
        "label": None if label is None else class_names[label],
    }
