"""Counts what a config's model costs: tokens per block, and multiply-accumulates per part, dense and reduced.

python -m top_jax.cli.flops --config configs/vim_s_top.py [--json FILE]

The counts are for one image, in three conventions (docs/flops.md). The `executed` one is checked against the
multiplications in the model that JAX traces.
"""

from __future__ import annotations

from absl import flags

from top_jax.cli import config_flag, flops_text, runner

_CONFIG = config_flag.define()
flags.adopt_module_key_flags(config_flag)  # so that --help shows it
_JSON = flags.DEFINE_string("json", None, "Write the counts here as JSON.")


def main(arguments: list[str]) -> None:
    """Counts, checks, prints and writes."""
    from top_jax.evaluation.flops.of_config import CHECK_STEPS, check_config, count_config

    runner.no_more(arguments)
    runner.check_json(_JSON.value)
    config = config_flag.read(_CONFIG)
    counts = count_config(config)
    flops_text.show_counts(counts)
    with runner.progress(f"tracing {config.model.name}", CHECK_STEPS) as advance:
        counts |= check_config(config, on_step=advance)
    flops_text.show_check(counts)
    runner.write_json(_JSON.value, counts)


if __name__ == "__main__":
    runner.run(main)
