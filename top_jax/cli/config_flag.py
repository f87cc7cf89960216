"""The flag --config of the commands that run a config; `ml_collections` is loaded with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from top_jax.config import RunConfig
from top_jax.errors import InputError

HELP = "Run config: a Python file with get_config(), such as configs/vim_digits_top.py."


def define(*, required: bool = True) -> flags.FlagHolder[Any]:
    """The flag --config, and --config.key=value for each of its keys."""
    holder = config_flags.DEFINE_config_file("config", None, HELP, lock_config=True)
    if required:
        flags.mark_flag_as_required("config")
    return holder


def read(holder: flags.FlagHolder[Any]) -> RunConfig:
    """The config that the command line asks for.

    Raises:
        InputError: there is no such file, or a value in it cannot be.
    """
    config = holder.value
    if not isinstance(config, config_dict.ConfigDict):  # where it could not be read, an object that raises when used
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        problem = "returns no ConfigDict from get_config()" if Path(file).is_file() else "does not exist"
        raise InputError(f"config file {file} {problem}; pass one such as configs/vim_digits_top.py.")
    return RunConfig.from_config_dict(config)


def name() -> str:
    """Name of the config file: configs/vim_t.py is vim_t."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
