"""Backbones."""

from top_jax.models.features import Features
from top_jax.models.registry import MODELS, abstract_model, create_model, model_config
from top_jax.models.vim import Vim, VimConfig

__all__ = ["MODELS", "Features", "Vim", "VimConfig", "abstract_model", "create_model", "model_config"]
