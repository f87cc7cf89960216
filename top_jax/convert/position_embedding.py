"""Resizes position embeddings to another image size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Final

import numpy as np
from absl import logging

from top_jax.convert.key_maps import family_of
from top_jax.convert.official_files import OFFICIAL_FILES, official_name
from top_jax.errors import InputError
from top_jax.models import BackboneConfig, VimConfig
from top_jax.models.resizing import cubic_matrix
from top_jax.pruning import ClassHome
from top_jax.values import height_width

IMAGENET_SIDE: Final = 224  # pixels
IMAGENET_STRIDE: Final = 16  # of the official ViM files for which `official_files` lists no other


def check_official_stride(path: str | Path, config: BackboneConfig) -> None:
    """Checks the model's stride against that of an official file, recognised by its name.

    Raises:
        InputError: they differ. The position embedding could be resized, but the weights expect the other stride.
    """
    if not isinstance(config, VimConfig):
        return
    name = official_name(path)
    if name is None:
        return
    stride = OFFICIAL_FILES[name].sizes.get("stride", IMAGENET_STRIDE)
    if stride != config.stride:
        raise InputError(
            f"{path} is the official file of stride {stride} ({_positions(stride)} positions at {IMAGENET_SIDE} "
            f"pixels), but the model has stride {config.stride}; pass stride={stride} (--override stride={stride}, "
            f"--config.model.stride={stride}), or take other weights (top_jax.list_models(pretrained=True))."
        )


def _positions(stride: int) -> int:
    return ((IMAGENET_SIDE - 16) // stride + 1) ** 2 + 1


def fit_position_embedding(
    config: BackboneConfig,
    state_dict: dict[str, np.ndarray],
    checkpoint_img_size: int | tuple[int, int] | None,
    source: str | Path = "the checkpoint",
    *,
    name: str | None = None,
) -> list[str]:
    """Resizes the position embedding of an official state_dict, in place, if its grid is not the model's.

    A file does not store its stride: 730 positions fit stride 8 at 224 pixels and stride 16 at 432. So a warning lists
    the possible grids, unless `checkpoint_img_size` is given.

    Args:
        config: the model's.
        state_dict: float32 arrays by official name.
        checkpoint_img_size: the image size that the weights were trained at, side or (height, width) in pixels; None
            takes the model's grid if the number of patches agrees, else a square one.
        source: name of the checkpoint in warnings.
        name: key of the embedding; None takes that of the family's classifiers.

    Returns:
        A description of the change: one line or none. An embedding of another width is left to the caller's checks.

    Raises:
        InputError: the number of patch tokens is not that of the grid.
    """
    name = family_of(config).position_embedding if name is None else name
    embedding = state_dict[name]
    if embedding.ndim != 3 or (embedding.shape[0], embedding.shape[2]) != (1, config.embed_dim):
        return []
    num_patches = embedding.shape[1] - (config.CLASS_TOKEN is not None)
    side = math.isqrt(max(num_patches, 0))
    if checkpoint_img_size is not None:
        grid = dataclasses.replace(config, img_size=height_width("checkpoint_img_size", checkpoint_img_size)).grid
    elif num_patches == config.num_patches:
        if side**2 == num_patches and config.grid != (side, side):
            logging.warning(
                "%s: its %d positions are taken as the model's grid of %s patches, but may be one of %s; pass "
                "checkpoint_img_size, the size it was trained at, to resize them.",
                *(source, embedding.shape[1], _times(config.grid), _times((side, side))),
            )
        return []
    elif num_patches <= 0:
        return []
    else:
        grid = (side, side)
    if grid[0] * grid[1] != num_patches:
        raise InputError(
            f"{name} has {num_patches} patch tokens, not those of a {_times(grid)} grid; pass "
            "checkpoint_img_size=(height, width), the size the checkpoint was trained at."
        )
    if grid == config.grid:
        return []
    if checkpoint_img_size is None:
        logging.warning(
            "%s: its %d positions, a grid of %s patches (%s), are resized to the model's %s (%s). This suits another "
            "image size; if the checkpoint was trained at another stride, give the model that stride.",
            *(source, embedding.shape[1], _times(grid), " or ".join(_readings(config, grid)) or "of unknown stride"),
            *(_times(config.grid), _reading(config)),
        )
    state_dict[name] = resize_position_embedding(embedding, grid, config.grid, class_token=config.CLASS_TOKEN)
    return [f"{name} resized from {_times(grid)} to {_times(config.grid)} patches (bicubic)"]


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _reading(config: BackboneConfig) -> str:
    """Returns the stride and the image size of a model as text."""
    height, width = config.img_size
    stride = getattr(config, "stride", config.patch_size)  # DeiT's patches never overlap
    return f"stride {stride} at {height if height == width else f'{height} x {width}'} pixels"


def _readings(config: BackboneConfig, grid: tuple[int, int]) -> list[str]:
    """Lists settings that give this grid: at the model's image size, at ImageNet's, and at the model's stride."""
    size, patch = config.img_size, config.patch_size
    stride = getattr(config, "stride", patch)
    candidates = [(s, other) for s in (size, (IMAGENET_SIDE, IMAGENET_SIDE)) for other in range(patch, 0, -1)]
    candidates += [((grid[0] * stride + gap, grid[1] * stride + gap), stride) for gap in (0, patch - stride)]
    found, known = [], set()
    for img_size, other in candidates:
        changes = {"img_size": img_size, **({"stride": other} if hasattr(config, "stride") else {})}
        try:
            model = dataclasses.replace(config, **changes)
        except InputError:  # patches do not tile this image
            continue
        if model.grid == grid and not {img_size, other} & known:
            known |= {img_size, other}
            found.append(_reading(model))
    return found


def resize_position_embedding(
    embedding: np.ndarray, source: tuple[int, int], target: tuple[int, int], *, class_token: ClassHome | None
) -> np.ndarray:
    """Interpolates a grid of position embeddings as torch's bicubic does (a = -0.75, no antialias).

    The class token's own embedding is taken out of the sequence and inserted at its index in the new one. (ViM has it
    in the *middle*; its official code takes index 0, a bug that shifts half of the grid by one patch.)

    Args:
        embedding: `[1, M, D]`, or `[1, M + 1, D]` with a class token.
        source: rows and columns of the grid that `embedding` was trained on.
        target: rows and columns of the new grid.
        class_token: index of the class token: `first` (index 0, DeiT), `middle` (index M // 2, ViM), or None if there
            is none (PlainMamba).

    Returns:
        The embedding of the target grid, in the same dtype; `embedding` itself if the grids are equal.

    Source: torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    if source == target:
        return embedding
    place = _place(source, class_token)
    patches, cls = np.delete(embedding[0], place, axis=0), embedding[0][place]
    grid = patches.reshape(*source, -1).astype(np.float64)
    grid = np.einsum("ih,jw,hwd->ijd", cubic_matrix(source[0], target[0]), cubic_matrix(source[1], target[1]), grid)
    patches = grid.reshape(target[0] * target[1], -1).astype(embedding.dtype)
    return np.insert(patches, _place(target, class_token), cls, axis=0)[None]


def _place(grid: tuple[int, int], class_token: ClassHome | None) -> list[int]:
    """Returns the index of the class token among the tokens of a grid, as a list of one or none."""
    return {None: [], "first": [0], "middle": [grid[0] * grid[1] // 2]}[class_token]
