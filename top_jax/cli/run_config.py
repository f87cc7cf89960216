"""Config file for the `--config` of a run directory: `run_config.py:runs/a` returns the config that runs/a keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from top_jax.config import make_config

if TYPE_CHECKING:
    from ml_collections import config_dict


def get_config(run: str) -> config_dict.ConfigDict:
    """Returns the config that the run directory keeps.

    Raises:
        InputError: this is not a run directory, or its config.json cannot be read.
    """
    from top_jax.training.run_directory import RunDirectory

    return make_config(**RunDirectory(run).read_config().to_dict())
