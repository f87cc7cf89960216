"""Trains a model.

python train.py --config configs/vim_s_top.py [--workdir runs/vim_s_top] [--config.batch_size=64 ...]

The same command started again goes on where the run stopped.
"""

from absl import flags

from top_jax.cli import runner

_CONFIG = runner.define_config()
flags.adopt_module_key_flags(runner)  # so that --help shows --config
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if not given.")


def main(arguments: list[str]) -> None:
    """Flags to config, config to training."""
    runner.no_more(arguments)
    config = runner.read_config(_CONFIG)
    workdir = _WORKDIR.value or f"runs/{runner.config_name()}"

    from top_jax.training import train  # after the flags are known to be good: it takes seconds

    train(config, workdir)


if __name__ == "__main__":
    runner.run(main)
