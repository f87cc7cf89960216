"""Backbones, classifiers and segmenters."""

from top_jax.models.backbone import Backbone
from top_jax.models.deit import Deit, DeitConfig
from top_jax.models.features import Features, to_grid
from top_jax.models.plain_mamba import DensePlainMamba, PlainMamba, PlainMambaConfig
from top_jax.models.registry import MODELS, abstract_model, create_model, model_config
from top_jax.models.segmenter import Segmenter, SegmenterConfig, abstract_segmenter, create_segmenter, segmenter_config
from top_jax.models.sizes import BackboneConfig
from top_jax.models.vim import DenseVim, DenseVimConfig, Vim, VimConfig

__all__ = [
    "MODELS",
    "Backbone",
    "BackboneConfig",
    "Deit",
    "DeitConfig",
    "DensePlainMamba",
    "DenseVim",
    "DenseVimConfig",
    "Features",
    "PlainMamba",
    "PlainMambaConfig",
    "Segmenter",
    "SegmenterConfig",
    "Vim",
    "VimConfig",
    "abstract_model",
    "abstract_segmenter",
    "create_model",
    "create_segmenter",
    "model_config",
    "segmenter_config",
    "to_grid",
]
