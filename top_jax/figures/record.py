"""All arrays of one image's pictures in one .npz, and what each of them is."""

from __future__ import annotations

from typing import Final

import numpy as np

from top_jax.figures.attention_maps import AttentionMaps
from top_jax.figures.kept_tokens import KeptTokens
from top_jax.figures.photo import Photo
from top_jax.figures.score_maps import ScoreMaps
from top_jax.figures.traversals import Traversals

ARRAYS: Final = {
    "photo": "uint8 [h, w, 3]: the part of the image that the model sees, at the drawn resolution",
    "grid": "int [2]: rows and columns of patches; M = rows x columns, places are raster places 0..M-1",
    "logits": "float32 [classes]: of the model as configured",
    "after_blocks": "int32 [S]: blocks, from 1, after which tokens were reduced",
    "source": "int32 [S, M]: token that stands for each patch after each reduction, -1 where none does; "
    "patches with the same number are one token",
    "kept": "bool [S, M]: source >= 0",
    "tokens": "int32 [S]: tokens left, class token left out",
    "fused": "int32 [S]: how many of them are fused ones, which stand for no one patch",
    "scores": "float32 [S, M]: what tokens were ranked by, NaN where one was gone; absent where none is ranked",
    "path/VARIANT": "int32 [G, L]: place of the token of each step of each scan in the block after the first "
    "reduction; -1 class token, -2 fused token",
    "gaps/VARIANT": "int32 [G, L]: dropped tokens that an aligned scan passes before each step",
    "attention/VARIANT/BLOCK": "float32 [L, L]: weight of each token's input (second axis) in each token's output: "
    "|alpha| averaged over channels, directions added up (a DeiT: attention averaged over heads)",
    "places/VARIANT/BLOCK": "int32 [L]: place of each of those tokens",
    "attention_map/VARIANT/BLOCK": "float32 [M]: what is drawn: the class token's row (or the mean of all rows) over "
    "its mean on the patches, NaN where there is no token",
}
"""What is in the file, by name; VARIANT is as in the picture, BLOCK a number from 1."""


def arrays_of(
    photo: Photo,
    logits: np.ndarray,
    kept: KeptTokens,
    scores: ScoreMaps | None,
    paths: Traversals | None,
    attention: AttentionMaps,
) -> dict[str, np.ndarray]:
    """What `ARRAYS` describes."""
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
