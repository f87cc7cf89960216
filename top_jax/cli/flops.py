"""Counts what a config's model costs: tokens per block, and multiply-accumulates per part, dense and reduced.

python -m top_jax.cli.flops --config configs/vim_s_top.py [--json FILE] [--noxla] [--compile]

Of one image, in three conventions (docs/flops.md). The `executed` one is checked against a count of the traced model,
and against XLA's cost analysis of it, with the difference explained.
"""

from __future__ import annotations

from absl import flags

from top_jax.cli import config_flag, flops_text, runner
from top_jax.errors import InputError

_CONFIG = config_flag.define()
flags.adopt_module_key_flags(config_flag)  # so that --help shows it
_JSON = flags.DEFINE_string("json", None, "Write the counts here as JSON.")
_XLA = flags.DEFINE_boolean("xla", True, "Check against XLA's cost analysis too.")
_COMPILE = flags.DEFINE_boolean("compile", False, "Compile the model, for the cost analysis of the optimised program.")


def main(arguments: list[str]) -> None:
    """Counts, checks, prints and writes."""
    from top_jax.evaluation.flops.report import CHECKS, check_config, count_config

    runner.no_more(arguments)
    if _COMPILE.value and not _XLA.value:
        raise InputError("--compile asks for XLA's cost analysis and --noxla for none; drop one of them.")
    runner.check_json(_JSON.value)
    config = config_flag.read(_CONFIG)
    counts = count_config(config)
    flops_text.show_counts(counts)
    what = "tracing and compiling" if _COMPILE.value else "tracing"
    with runner.progress(f"{what} {config.model.name}", CHECKS) as advance:
        counts |= check_config(config, xla=_XLA.value, compile=_COMPILE.value, on_check=advance)
    flops_text.show_check(counts)
    runner.write_json(_JSON.value, counts)


if __name__ == "__main__":
    runner.run(main)
