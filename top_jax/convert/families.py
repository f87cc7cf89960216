"""What sets the official checkpoints of one family of models apart from those of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from top_jax.convert.deit import deit_keys
from top_jax.convert.keys import Key
from top_jax.convert.plain_mamba import plain_mamba_keys
from top_jax.convert.vim import vim_keys
from top_jax.models import MODELS, BackboneConfig, DeitConfig, PlainMambaConfig, VimConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """The checkpoints of one family.

    Attributes:
        name: as its paper spells it.
        keys: every parameter and buffer of a checkpoint of given sizes.
        entry: where a .pth file holds its state_dict.
        position_embedding: its key.
    """

    name: str
    keys: Callable[[Any], list[Key]]
    entry: str
    position_embedding: str


FAMILIES: Final[dict[type, Family]] = {
    VimConfig: Family("ViM", vim_keys, "model", "pos_embed"),
    PlainMambaConfig: Family("PlainMamba", plain_mamba_keys, "state_dict", "backbone.pos_embed"),
    DeitConfig: Family("DeiT", deit_keys, "model", "pos_embed"),
}


def family_of(config: BackboneConfig) -> Family:
    """The family of a model."""
    return FAMILIES[type(config)]


def official_keys(config: BackboneConfig) -> list[Key]:
    """Every parameter and buffer of an official checkpoint of this size, with its place in our model."""
    return family_of(config).keys(config)


def models_of(kind: type) -> list[str]:
    """The named models of a family, by the type of its configs."""
    return [name for name, config in MODELS.items() if isinstance(config, kind)]
