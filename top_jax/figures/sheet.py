"""One image's sheet: all of its pictures in one PNG, and all of their arrays in one .npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.evaluation.trace import CLASS
from top_jax.figures.attention_maps import AttentionMaps, attention_maps, attention_section
from top_jax.figures.examine import Examination
from top_jax.figures.kept_tokens import KeptTokens, ScoreMaps, kept_section, kept_tokens, score_maps, scores_section
from top_jax.figures.page import Section, draw_page
from top_jax.figures.photo import Photo
from top_jax.figures.scan_paths import ScanPaths, paths_section, scan_paths
from top_jax.files import write_arrays
from top_jax.models import Backbone, Deit
from top_jax.pruning import Evit, Merging, Pruning, Reduction

KINDS: Final = ("tokens", "scores", "paths", "attention")
"""The sections of a sheet."""
ARRAYS: Final = {
    "photo": "uint8 [h, w, 3]: the part of the image that the model sees, at the drawn resolution",
    "grid": "int [2]: rows and columns of patches; M = rows x columns, and a place is a raster index 0..M-1",
    "logits": "float32 [classes]: logits of the model as configured",
    "after_blocks": "int32 [S]: blocks, counted from 1, after which tokens were reduced",
    "source": "int32 [S, M]: index of the token that represents each patch after each reduction, -1 for a dropped "
    "patch; merged patches share an index",
    "kept": "bool [S, M]: source >= 0",
    "tokens": "int32 [S]: number of remaining tokens, without the class token",
    "fused": "int32 [S]: how many of them are fused tokens, which represent no single patch",
    "scores": "float32 [S, M]: scores that tokens were ranked by, NaN for patches dropped earlier; absent if "
    "the method ranks no tokens",
    "path/VARIANT": "int32 [G, L]: place of the token at each step of each scan in the block after the first "
    "reduction; -1 class token, -2 fused token",
    "gaps/VARIANT": "int32 [G, L]: number of dropped tokens that an aligned scan passes before each step",
    "attention/VARIANT/BLOCK": "float32 [L, L]: weight of each token's input (second axis) in each token's output: "
    "|alpha| of the sum of all directions, averaged over channels (a DeiT: attention averaged over heads)",
    "places/VARIANT/BLOCK": "int32 [L]: place of each of those tokens",
    "attention_map/VARIANT/BLOCK": "float32 [M]: what is drawn: the class token's row (or the mean of all rows) "
    "divided by its mean over the patches, NaN where there is no token",
}
"""The arrays of a .npz by name; VARIANT is named as in the picture, BLOCK is a number counted from 1."""


class Subject(NamedTuple):
    """An image to draw a sheet of.

    Attributes:
        name: its name on the page.
        photo: the part that the model sees.
        label: index of its class; None if it is not known.
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
    """Writes `stem`.png and `stem`.npz (see `ARRAYS`).

    Args:
        stem: path of both files, without a suffix.
        subject: the image.
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
    num_patches, trace = model.config.num_patches, examination.own
    kept = kept_tokens(trace, num_patches)
    scores = score_maps(trace, num_patches)
    paths = scan_paths(examination)
    attention = attention_maps(examination, num_patches)
    sections: dict[str, Section] = {
        "tokens": kept_section(kept, subject.photo, merges=isinstance(model.reduction, Merging))
    }
    if scores is not None:
        sections["scores"] = scores_section(scores, subject.photo, score=str(model.reduction.needed_evidence))
    if paths is not None:
        sections["paths"] = paths_section(paths, subject.photo)
    if attention.weights:
        sections["attention"] = attention_section(attention, subject.photo, scans=not isinstance(model, Deit))
    logits = np.asarray(trace.logits[0])
    prediction = _prediction(logits, subject.label, class_names)
    predicted, share = as_class(prediction["prediction"]), 100 * prediction["probability"]
    title = f"{subject.name}: predicted {predicted} ({share:.0f} %)"
    if prediction["label"] is not None:
        title += f", labelled {as_class(prediction['label'])}"
    chosen = [sections[kind] for kind in KINDS if kind in kinds and kind in sections]
    png, npz = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "npz"))
    draw_page(png, title, f"{about}; {describe_reduction(model.reduction)}.", subject.photo, chosen)
    write_arrays(npz, _arrays(subject.photo, logits, kept, scores, paths, attention))
    return {
        "image": subject.name,
        "png": png.name,
        "npz": npz.name,
        **prediction,
        "predictions": {name: class_names[one.logits[0].argmax()] for name, one in examination.traces.items()},
        "tokens": {str(block): int(count) for block, count in zip(kept.after_blocks, kept.tokens, strict=True)},
        "class_token": bool((trace.blocks[1].places == CLASS).any()),
    }


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


def _arrays(
    photo: Photo,
    logits: np.ndarray,
    kept: KeptTokens,
    scores: ScoreMaps | None,
    paths: ScanPaths | None,
    attention: AttentionMaps,
) -> dict[str, np.ndarray]:
    """Returns the arrays that `ARRAYS` describes."""
    arrays = {
        "photo": photo.pixels,
        "grid": np.array(photo.grid),
        "logits": logits,
        **kept._asdict(),
        "kept": kept.source >= 0,
    }
    if scores is not None:
        arrays["scores"] = scores.scores
    if paths is not None:
        arrays |= {f"path/{name}": steps for name, steps in paths.steps.items()}
        arrays |= {f"gaps/{name}": gaps for name, gaps in paths.gaps.items()}
    for name, of_blocks in (
        ("attention", attention.matrix),
        ("places", attention.places),
        ("attention_map", attention.weights),
    ):
        arrays |= {f"{name}/{variant}/{block}": array for (variant, block), array in of_blocks.items()}
    return arrays
