"""Trains a model, or resumes a run.

top-jax train --config vim_digits_top [--workdir runs/digits] [--config.batch_size=64 ...]

Start the same command again to resume the run where it stopped. To train on several machines, start it on each of them
with --distributed: see docs/guides/devices.md.
"""

from __future__ import annotations

from absl import flags

from top_jax.cli import runner, shared_flags

_CONFIG = shared_flags.define_config()
shared_flags.define_distributed()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Run directory; by default runs/<config name>, followed by the data's name if --config.data... chooses other data.",
)


def main(arguments: list[str]) -> None:
    """Reads the config from the flags and trains."""
    runner.no_more(arguments)
    config = shared_flags.read_config(_CONFIG)
    workdir = _WORKDIR.value or shared_flags.default_workdir(config)

    shared_flags.join_processes()
    from top_jax.training import train  # takes seconds, so only after the flags are checked

    train(config, workdir)


if __name__ == "__main__":
    runner.run(main)
