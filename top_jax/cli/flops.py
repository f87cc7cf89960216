"""Counts what a config's model costs: tokens per block, and multiply-accumulates per part, dense and reduced.

python -m top_jax.cli.flops --config configs/vim_s_top.py [--json FILE] [--noxla] [--compile]

Of one image, in three conventions (docs/flops.md). The `executed` one is checked against a count of the traced model,
and against XLA's cost analysis of it, with the difference explained.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from top_jax.cli import config_flag, flops_text, runner
from top_jax.config import RunConfig
from top_jax.errors import InputError

_CONFIG = config_flag.define()
flags.adopt_module_key_flags(config_flag)  # so that --help shows it
_JSON = flags.DEFINE_string("json", None, "Write the counts here as JSON.")
_XLA = flags.DEFINE_boolean("xla", True, "Check against XLA's cost analysis too.")
_COMPILE = flags.DEFINE_boolean("compile", False, "Compile the model, for the cost analysis of the optimised program.")


def main(arguments: list[str]) -> None:
    """Counts, checks, prints and writes."""
    runner.no_more(arguments)
    if _COMPILE.value and not _XLA.value:
        raise InputError("--compile asks for XLA's cost analysis and --noxla for none; drop one of them.")
    config = config_flag.read(_CONFIG)
    counts = count(config)
    flops_text.show_counts(counts)
    counts |= check(config, xla=_XLA.value, compile=_COMPILE.value)
    flops_text.show_check(counts)
    runner.write_json(_JSON.value, counts)


def count(config: RunConfig) -> dict[str, Any]:
    """The analytic count of the config's model, reduced and dense.

    Raises:
        InputError: a model or a reduction that cannot be.
    """
    from top_jax.evaluation.flops import count_macs
    from top_jax.models import model_config
    from top_jax.pruning import make_reduction

    sizes = model_config(config.model.name, **config.model.overrides())
    cost, dense = count_macs(sizes, make_reduction(**config.pruning.settings())), count_macs(sizes)
    return {
        "model": config.model.name,
        "pruning": config.pruning.settings(),
        "class_token": sizes.CLASS_TOKEN is not None,
        "tokens_per_block": list(cost.tokens_per_block),
        "gmacs": {name: cost.gmacs(name) for name in cost.macs},
        "dense_gmacs": {name: dense.gmacs(name) for name in dense.macs},
        "parts": {name: cost.parts(name) for name in cost.macs},
        "dense_parts": {name: dense.parts(name) for name in dense.macs},
        "blocks": {name: list(blocks) for name, blocks in cost.blocks.items()},
    }


def check(config: RunConfig, *, xla: bool, compile: bool) -> dict[str, Any]:
    """The parameters and the cross-check of the config's model.

    Raises:
        InputError: a reduction that the model cannot have.
    """
    from top_jax.evaluation.flops.cross_check import cross_check
    from top_jax.models import model_config
    from top_jax.pruning import make_reduction

    sizes = model_config(config.model.name, **config.model.overrides())
    reduction = make_reduction(**config.pruning.settings())
    with runner.progress(f"tracing {config.model.name}{' and compiling it' * compile}", 3) as advance:
        found = cross_check(sizes, reduction, xla=xla, compile=compile, on_check=advance)
    return {"parameters": found.pop("parameters"), "cross_check": found}


if __name__ == "__main__":
    runner.run(main)
