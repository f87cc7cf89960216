"""Flags that several commands share: the config, the checkpoint, and the processes of a distributed run.

A command calls the `define_*` functions that it needs, and then `flags.adopt_module_key_flags(shared_flags)` so that
--help lists them. absl and `top_jax.config` are all that is loaded until a flag is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict, config_flags

from top_jax.config import RunConfig
from top_jax.errors import InputError

if TYPE_CHECKING:
    from top_jax.models import Backbone

CONFIG_HELP = "Run config: a Python file with get_config(), such as configs/vim_digits_top.py."
CHECKPOINT_HELP = "Run directory, or an official .pth or .safetensors file."


def define_config(*, required: bool = True, help_text: str = CONFIG_HELP) -> flags.FlagHolder[Any]:
    """Defines --config, and with it --config.key=value for each key of the file."""
    holder = config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    if required:
        flags.mark_flag_as_required("config")
    return holder


def read_config(holder: flags.FlagHolder[Any]) -> RunConfig:
    """Returns the config of the command line, checked.

    Raises:
        InputError: the file does not exist or returns no config, or a value in it is out of range.
    """
    config = holder.value
    if not isinstance(config, config_dict.ConfigDict):  # absl keeps an object that raises when it is used
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        problem = "returns no ConfigDict from get_config()" if Path(file).is_file() else "does not exist"
        raise InputError(f"config file {file} {problem}; pass one such as configs/vim_digits_top.py.")
    return RunConfig.from_config_dict(config)


def config_name() -> str:
    """Returns the name of the config file: `vim_t` for configs/vim_t.py."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def define_checkpoint() -> flags.FlagHolder[Any]:
    """Defines --checkpoint, required, and --which and --ema, which choose among its weights."""
    _define_weights_choice()
    return flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, required=True)


def define_checkpoints(help_text: str) -> flags.FlagHolder[Any]:
    """Defines the flags of `define_checkpoint`, with a --checkpoint that may be repeated."""
    _define_weights_choice()
    return flags.DEFINE_multi_string("checkpoint", None, help_text, required=True)


def load_model(checkpoint: str | Path, config: RunConfig) -> Backbone:
    """Returns the config's model and reduction in eval mode, with the weights that --which and --ema choose.

    Raises:
        InputError: no such checkpoint, weights of another model or class count, or a reduction that the model cannot
            have.
    """
    from top_jax.build import build_abstract_model, build_reduction
    from top_jax.training.weights import checkpoint_weights, fill

    model = build_abstract_model(config.model, build_reduction(config.pruning))
    weights = checkpoint_weights(checkpoint, config.model, which=flags.FLAGS.which, ema=flags.FLAGS.ema)
    return fill(model, weights)


def define_distributed() -> None:
    """Defines --distributed and the flags of a run over several processes."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Join a run of several processes (docs/scaling.md). SLURM, Cloud TPU, Open MPI and Kubernetes need no other "
        "flag; elsewhere set the next three too.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, reachable from every process.")
    flags.DEFINE_integer("num_processes", None, "Number of processes in the run.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Stop if another process is silent for this many seconds.", lower_bound=1
    )
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait at the start for the other processes.", lower_bound=1)


def join_processes() -> None:
    """Joins the other processes if --distributed is set; call it before JAX looks for devices.

    Raises:
        InputError: the flags do not fit together, or more of them are needed.
        RunError: the other processes cannot be reached.
    """
    given = flags.FLAGS
    by_hand = {name: given[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    if not given.distributed:
        if extra := [name for name, value in by_hand.items() if value is not None]:
            raise InputError(f"--{extra[0]} is given without --distributed; add --distributed, or drop --{extra[0]}.")
        return

    from top_jax import distributed

    distributed.initialize(**by_hand, heartbeat_timeout=given.heartbeat_timeout, start_timeout=given.start_timeout)


def _define_weights_choice() -> None:
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Checkpoint of a run directory: best accuracy, or latest.")
    flags.DEFINE_boolean("ema", None, "Use the averaged weights; by default if the run kept them, and never of a file.")
