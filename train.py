"""Trains a model.

python train.py --config configs/vim_s_top.py [--workdir runs/vim_s_top] [--config.batch_size=64 ...]

The same command started again goes on where the run stopped.
"""

from absl import flags

from top_jax.cli import config_flag, runner

_CONFIG = config_flag.define()
flags.adopt_module_key_flags(config_flag)  # so that --help shows --config
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if not given.")


def main(arguments: list[str]) -> None:
    """Flags to config, config to training."""
    runner.no_more(arguments)
    config = config_flag.read(_CONFIG)
    workdir = _WORKDIR.value or f"runs/{config_flag.name()}"

    from top_jax.training import train  # after the flags are known to be good: it takes seconds

    train(config, workdir)


if __name__ == "__main__":
    runner.run(main)
