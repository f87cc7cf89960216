"""One image's sheet: everything that was found out about it, as a PNG and as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures import attention_maps, kept_tokens, score_maps, traversals
from top_jax.figures.examine import Examination
from top_jax.figures.page import Section, draw_page
from top_jax.figures.photo import Photo
from top_jax.figures.record import arrays_of
from top_jax.models import Backbone, Deit
from top_jax.pruning import Evit, Merging, Pruning, Reduction

KINDS: Final = ("tokens", "scores", "paths", "attention")
"""The sections of a sheet."""


class Subject(NamedTuple):
    """An image and what is known of it.

    Attributes:
        name: of the image, for people.
        photo: what is drawn.
        label: its class, where that is known.
    """

    name: str
    photo: Photo
    label: int | None


def draw_sheet(
    stem: Path,
    subject: Subject,
    examination: Examination,
    model: Backbone,
    *,
    about: str,
    class_names: tuple[str, ...],
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Any]:
    """Writes `stem`.png and `stem`.npz (`top_jax.figures.record.ARRAYS`).

    Args:
        stem: the files, without their suffix.
        subject: the image.
        examination: of it.
        model: as configured.
        about: the model, for people; what reduces its tokens is added.
        class_names: of each label.
        kinds: the sections to draw, of `KINDS`; the arrays are always all of those that were computed.

    Returns:
        What an index of several sheets should say of this one, for JSON.
    """
    num_patches, trace = model.config.num_patches, examination.own
    kept = kept_tokens.kept_tokens(trace, num_patches)
    scores = score_maps.score_maps(trace, num_patches)
    paths = traversals.traversals(examination)
    attention = attention_maps.attention_maps(examination, num_patches)
    sections: dict[str, Section] = {
        "tokens": kept_tokens.section(kept, subject.photo, merges=isinstance(model.pruning, Merging))
    }
    if scores is not None:
        sections["scores"] = score_maps.section(scores, subject.photo, score=str(model.pruning.evidence))
    if paths is not None:
        sections["paths"] = traversals.section(paths, subject.photo)
    if attention.weights:
        sections["attention"] = attention_maps.section(attention, subject.photo, scans=not isinstance(model, Deit))
    logits = np.asarray(trace.logits[0])
    said = _said(logits, subject.label, class_names)
    title = f"{subject.name}: predicted {said['prediction']} ({100 * said['probability']:.0f} %)"
    if said["label"] is not None:
        title += f", labelled {said['label']}"
    chosen = [sections[kind] for kind in KINDS if kind in kinds and kind in sections]
    png, npz = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "npz"))
    draw_page(png, title, f"{about}; {describe(model.pruning)}.", subject.photo, chosen)
    with npz.open("wb") as file:  # by name, np.savez would take a dot in it for a suffix
        arrays = arrays_of(subject.photo, logits, kept, scores, paths, attention)
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]  none is named allow_pickle
    return {
        "image": subject.name,
        "png": png.name,
        "npz": npz.name,
        **said,
        "predictions": {name: class_names[one.logits[0].argmax()] for name, one in examination.traces.items()},
        "tokens": {str(block): int(count) for block, count in zip(kept.after_blocks, kept.tokens, strict=True)},
        "class_token": bool((trace.blocks[1].places == CLASS).any()),
    }


def describe(reduction: Reduction) -> str:
    """A reduction for people, in a line."""
    if not reduction.after_blocks:
        return "dense"
    verb = {Merging: "merged", Evit: "pruned by EViT"}.get(type(reduction), "pruned")
    ratios = reduction.ratios[:1] if len(set(reduction.ratios)) == 1 else reduction.ratios
    shares = ", ".join(f"{100 * ratio:g}" for ratio in ratios)
    several = len(reduction.after_blocks) > 1
    blocks = f"{'blocks' if several else 'block'} {', '.join(map(str, reduction.after_blocks))}"
    text = f"{verb} after {blocks} to {shares} %{' each time' if several and len(ratios) == 1 else ''}"
    if reduction.evidence is not None:
        text += f", score '{reduction.evidence}'"
    if isinstance(reduction, Pruning | Evit) and reduction.order != "position":
        text += f", in {reduction.order} order"
    return f"{text}, alignment '{reduction.alignment}'"


def _said(logits: np.ndarray, label: int | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    shares = np.exp(logits - logits.max())
    best = int(np.argmax(logits))
    return {
        "prediction": class_names[best],
        "probability": float(shares[best] / shares.sum()),
        "label": None if label is None else class_names[label],
    }
