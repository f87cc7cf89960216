"""Backbones."""

from top_jax.models.backbone import Backbone
from top_jax.models.deit import Deit, DeitConfig
from top_jax.models.features import Features, to_grid
from top_jax.models.plain_mamba import PlainMamba, PlainMambaConfig
from top_jax.models.registry import MODELS, abstract_model, create_model, model_config
from top_jax.models.sizes import BackboneConfig
from top_jax.models.vim import Vim, VimConfig

__all__ = [
    "MODELS",
    "Backbone",
    "BackboneConfig",
    "Deit",
    "DeitConfig",
    "Features",
    "PlainMamba",
    "PlainMambaConfig",
    "Vim",
    "VimConfig",
    "abstract_model",
    "create_model",
    "model_config",
    "to_grid",
]
