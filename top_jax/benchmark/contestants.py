"""The models timed for a config: its own, dense and pruned, the other alignments, and a DeiT for comparison."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple

from top_jax.errors import InputError
from top_jax.evaluation.flops import Cost, count_macs
from top_jax.models import MODELS, Backbone, BackboneConfig, DeitConfig, abstract_model
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
_WIDEST_HEAD: Final = 64  # DeiT's


class Contestant(NamedTuple):
    """A model to be timed.

    Attributes:
        name: unique, as in the tables.
        what: description.
        weights: contestants with the same value have weights of the same shapes, and share them.
        prunes: whether it is the config's model with a reduction.
        model: without weights, only their shapes.
        cost: multiply-accumulates of one image.
        parameters: number of parameters.
    """

    name: str
    what: str
    weights: str
    prunes: bool
    model: Backbone
    cost: Cost
    parameters: int

    def row(self) -> dict[str, Any]:
        """Returns the contestant as JSON values, for a report."""
        return {
            "contestant": self.name,
            "what": self.what,
            "parameters": self.parameters,
            "tokens_per_block": list(self.cost.tokens_per_block),
            "gmacs": {convention: self.cost.gmacs(convention) for convention in self.cost.macs},
        }


def field_of(name: str, reduction: Reduction, overrides: dict[str, Any]) -> tuple[list[Contestant], str | None]:
    """Returns the contestants of a config: the dense model, the config's own, the yardstick DeiT, other alignments.

    All are timed without drop-path, train steps too. The yardstick is the DeiT that the papers compare with, at the
    config's image size, patch size and classes. Where the config changes the model's width or depth, or the papers name
    no DeiT, it is the DeiT of the same width whose depth brings it closest to the model's number of parameters.

    Args:
        name: of `create_model`.
        reduction: the config's; if it is empty, only the dense model and the yardstick are timed.
        overrides: the config's overrides for `create_model`.

    Returns:
        The contestants, and the reason if there is no yardstick, else None.

    Raises:
        InputError: sizes or a reduction that the model cannot have.
    """
    overrides = {**overrides, "drop_path": 0.0}
    dense = _contestant(DENSE, f"{name}, all tokens", name, None, overrides)
    field = [dense]
    if reduction.after_blocks:
        what = f"{name}, the config's {reduction}"
        field.append(_contestant(f"{_label(reduction)} (config)", what, name, reduction, overrides))
    yardstick, problem = _yardstick(name, dense, overrides)
    field += [] if yardstick is None else [yardstick]
    for other in _alignments(reduction) if isinstance(dense.model.config, MambaConfig) else ():
        field.append(_contestant(_label(other), f"{name}, {other}", name, other, overrides))
    return field, problem


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


def _contestant(
    label: str, what: str, name: str, reduction: Reduction | None, overrides: dict[str, Any], weights: str = DENSE
) -> Contestant:
    model = abstract_model(name, pruning=reduction, **overrides)
    return Contestant(
        label, what, weights, reduction is not None, model, count_macs(model.config, reduction), parameter_count(model)
    )


def _yardstick(name: str, dense: Contestant, overrides: dict[str, Any]) -> tuple[Contestant | None, str | None]:
    config = dense.model.config
    if isinstance(config, DeitConfig):
        return None, "the model is a DeiT itself"
    # A scan's patches may overlap, DeiT's do not: a patch of the stride's size gives the same number of tokens.
    sizes = {
        "img_size": config.img_size, "patch_size": config.stride, "num_classes": config.num_classes,
        "dtype": config.dtype, "remat": config.remat,
    }  # fmt: skip
    named = _YARDSTICKS.get(name) if _as_named(name, config) else None
    try:
        if named is None:
            sizes |= _same_size(dense, sizes)
        found = _contestant(named or "deit", "", named or "deit_tiny", None, sizes, weights="deit")
    except InputError as problem:
        return None, f"there is no DeiT of this size: {problem}"
    made = found.model.config
    how = f"{named}, which the papers compare with" if named else "the DeiT of this width with about as many parameters"
    return found._replace(what=f"{how}: {made.embed_dim} wide, {made.depth} blocks, {made.num_heads} heads"), None


def _as_named(name: str, config: BackboneConfig) -> bool:
    """Returns whether width and depth are those of the named model."""
    return (config.embed_dim, config.depth) == (MODELS[name].embed_dim, MODELS[name].depth)


def _same_size(dense: Contestant, sizes: dict[str, Any]) -> dict[str, int]:
    """Returns width, heads and depth of the DeiT with the model's width and about as many parameters."""
    width = dense.model.config.embed_dim
    head = max(size for size in range(1, _WIDEST_HEAD + 1) if width % size == 0)
    same = {"embed_dim": width, "num_heads": width // head}
    one, two = (parameter_count(abstract_model("deit_tiny", **sizes, **same, depth=depth)) for depth in (1, 2))
    return {**same, "depth": max(1, 1 + round((dense.parameters - one) / (two - one)))}
