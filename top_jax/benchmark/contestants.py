"""The models timed for a config: its own, dense and pruned, the other alignments, and a DeiT for comparison."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

from top_jax.build import Model, backbone_of, build_abstract_model
from top_jax.config import ModelConfig
from top_jax.errors import InputError
from top_jax.evaluation.flops import Cost, count_macs
from top_jax.models import MODELS, DeitConfig, Segmenter, abstract_model
from top_jax.models.sizes import MambaConfig
from top_jax.models.weights import parameter_count
from top_jax.pruning import METHODS, WAYS, Pruning, Reduction

DENSE: Final = "dense"
# The DeiT that the papers compare a model with.
_YARDSTICKS: Final = {
    "vim_tiny": "deit_tiny",
    "vim_small": "deit_small",
    "vim_base": "deit_base",
    "plain_mamba_l1": "deit_tiny",
    "plain_mamba_l2": "deit_small",
}
_WIDEST_HEAD: Final = 64  # the width of DeiT's heads


class Contestant(NamedTuple):
    """A model to be timed.

    Attributes:
        name: unique, as in the tables.
        what: description.
        weights: contestants with the same value have weights of the same shapes, and share them.
        model: without weights, only their shapes.
        img_size: (height, width) of the images.
        cost: multiply-accumulates of one image.
        parameters: number of parameters.
    """

    name: str
    what: str
    weights: str
    model: Model
    img_size: tuple[int, int]
    cost: Cost
    parameters: int

    @property
    def prunes(self) -> bool:
        """Whether this is the config's model with a reduction."""
        return bool(self.model.reduction.after_blocks)

    def row(self) -> dict[str, Any]:
        """Returns the contestant as JSON values, for a report."""
        return {
            "contestant": self.name,
            "what": self.what,
            "parameters": self.parameters,
            "tokens_per_block": list(self.cost.tokens_per_block),
            **self.cost.in_gmacs(),
        }


def field_of(
    config: ModelConfig, reduction: Reduction, img_size: tuple[int, int] | None = None
) -> tuple[list[Contestant], str | None]:
    """Returns the contestants of a config: the dense model, the config's own, the yardstick DeiT, other alignments.

    All are timed without drop-path, train steps too. The yardstick is the DeiT that the papers compare with, at the
    config's image size, patch size and classes. Where the config changes the model's width or depth, or the papers name
    no DeiT, a DeiT of the same width is taken. Its depth brings it closest to the model's number of parameters. A
    segmenter has no yardstick.

    Args:
        config: the model.
        reduction: the config's; if it is empty, only the dense model and the yardstick are timed.
        img_size: (height, width) of the images; None is the model's. Only a PlainMamba segmenter takes others.

    Returns:
        The contestants, and the reason if there is no yardstick, else None.

    Raises:
        InputError: sizes or a reduction that the model cannot have.
    """
    name, config = config.name, dataclasses.replace(config, drop_path=0.0)

    def contestant(label: str, what: str, reduction: Reduction | None = None) -> Contestant:
        model = build_abstract_model(config, reduction)
        return _contestant(label, f"{name}, {what}", DENSE, model, _size_of(model, img_size))

    dense = contestant(DENSE, "all tokens")
    field = [dense]
    if reduction.after_blocks:
        field.append(contestant(f"{_label(reduction)} (config)", f"the config's {reduction}", reduction))
    yardstick, problem = _yardstick(name, dense)
    field += [] if yardstick is None else [yardstick]
    for other in _alignments(reduction) if isinstance(backbone_of(dense.model).config, MambaConfig) else ():
        field.append(contestant(_label(other), str(other), other))
    return field, problem


def _size_of(model: Model, img_size: tuple[int, int] | None) -> tuple[int, int]:
    backbone = backbone_of(model)
    own = backbone.config.img_size
    if img_size not in (None, own) and not backbone.ANY_SIZE:
        raise InputError(f"data.crop_size={img_size}, but the model takes {own} only; drop it, or set model.img_size.")
    return own if img_size is None else img_size


def _alignments(reduction: Reduction) -> list[Reduction]:
    """Returns ToP's other alignments with the same schedule and score."""
    if not isinstance(reduction, Pruning) or not reduction.after_blocks:
        return []
    others = [dataclasses.replace(reduction, alignment=alignment, order=order) for alignment, order in WAYS]
    return [other for other in others if other != reduction]


def _label(reduction: Reduction) -> str:
    method = next(name for name, kind in METHODS.items() if type(reduction) is kind)
    by_score = isinstance(reduction, Pruning) and reduction.order == "score"
    return f"{method} {reduction.alignment}{', score order' if by_score else ''}"


def _contestant(label: str, what: str, weights: str, model: Model, img_size: tuple[int, int]) -> Contestant:
    sized = img_size if isinstance(model, Segmenter) else None
    cost = count_macs(model.config, model.reduction, img_size=sized)
    return Contestant(label, what, weights, model, img_size, cost, parameter_count(model))


def _yardstick(name: str, dense: Contestant) -> tuple[Contestant | None, str | None]:
    if isinstance(dense.model, Segmenter):
        return None, "the model is a segmenter, and no DeiT segmenter exists"
    config = dense.model.config
    if isinstance(config, DeitConfig):
        return None, "the model is a DeiT itself"
    # A scan's patches may overlap, DeiT's do not: a patch of the stride's size gives the same number of tokens.
    sizes = {
        "img_size": config.img_size, "patch_size": config.stride, "num_classes": config.num_classes,
        "dtype": config.dtype, "remat": config.remat,
    }  # fmt: skip
    usual = MODELS[name]
    as_named = (config.embed_dim, config.depth) == (usual.embed_dim, usual.depth)
    named = _YARDSTICKS.get(name) if as_named else None
    try:
        if named is None:
            sizes |= _same_size(dense, sizes)
        model = abstract_model(named or "deit_tiny", **sizes)
    except InputError as problem:
        return None, f"there is no DeiT of this size: {problem}"
    made = model.config
    how = f"{named}, which the papers compare with" if named else "the DeiT of this width with about as many parameters"
    what = f"{how}: {made.embed_dim} wide, {made.depth} blocks, {made.num_heads} heads"
    return _contestant(named or "deit", what, "deit", model, dense.img_size), None


def _same_size(dense: Contestant, sizes: dict[str, Any]) -> dict[str, int]:
    """Returns width, heads and depth of the DeiT with the model's width and about as many parameters."""
    width = backbone_of(dense.model).config.embed_dim
    head = max(size for size in range(1, _WIDEST_HEAD + 1) if width % size == 0)
    same = {"embed_dim": width, "num_heads": width // head}
    one, two = (parameter_count(abstract_model("deit_tiny", **sizes, **same, depth=depth)) for depth in (1, 2))
    return {**same, "depth": max(1, 1 + round((dense.parameters - one) / (two - one)))}
