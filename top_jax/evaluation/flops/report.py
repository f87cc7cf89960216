"""What a run's config costs, as the command `flops` writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from top_jax.build import build_reduction, build_sizes
from top_jax.config import RunConfig
from top_jax.evaluation.flops.count import count_macs
from top_jax.evaluation.flops.cross_check import check_executed, check_xla, trace_model
from top_jax.models import BackboneConfig
from top_jax.pruning import Reduction

CHECKS: Final = 3  # calls of `on_check`


def count_config(config: RunConfig) -> dict[str, Any]:
    """The analytic count of the config's model, with its reduction and dense; for JSON.

    Raises:
        InputError: a model or a reduction that cannot be.
    """
    sizes, reduction = _model(config)
    cost, dense = count_macs(sizes, reduction), count_macs(sizes)
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


def check_config(
    config: RunConfig, *, xla: bool, compile: bool = False, on_check: Callable[[int], object] = lambda _: None
) -> dict[str, Any]:
    """Its parameters, and the executed count against those of the jaxpr and of XLA; for JSON.

    Args:
        config: of the run.
        xla: ask XLA too.
        compile: as of `check_xla`.
        on_check: called with 1 when the model is traced, and after each check.

    Raises:
        InputError: a reduction that the model cannot have.
    """
    sizes, reduction = _model(config)
    model = trace_model(sizes, reduction)
    on_check(1)
    counted, without_scans, scans = check_executed(model, count_macs(sizes, reduction))
    on_check(1)
    found = check_xla(model, compile=compile) if xla else None
    on_check(1)
    checks = {
        "platform": model.platform,
        "dtype": config.model.dtype,
        "jaxpr": counted._asdict(),
        "jaxpr_above_executed": {"without_scans": without_scans, "scans": scans},
        "xla": None if found is None else found.to_dict(),
    }
    return {"parameters": model.parameters, "cross_check": checks}


def _model(config: RunConfig) -> tuple[BackboneConfig, Reduction]:
    sizes = build_sizes(config.model)
    return sizes, build_reduction(config.pruning)
