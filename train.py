"""Trains a model.

python train.py --config configs/vim_s_top.py [--workdir runs/vim_s_top] [--config.batch_size=64 ...]

The same command started again goes on where the run stopped. On several machines, the same command on each with
--distributed: docs/scaling.md.
"""

from absl import flags

from top_jax.cli import config_flag, distributed_flags, runner

_CONFIG = config_flag.define()
for _shared in (config_flag, distributed_flags):  # so that --help shows them
    flags.adopt_module_key_flags(_shared)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if not given.")


def main(arguments: list[str]) -> None:
    """Flags to config, config to training."""
    runner.no_more(arguments)
    config = config_flag.read(_CONFIG)
    workdir = _WORKDIR.value or f"runs/{config_flag.name()}"

    distributed_flags.join()
    from top_jax.training import train  # after the flags are known to be good: it takes seconds

    train(config, workdir)


if __name__ == "__main__":
    runner.run(main)
