"""What a run says when it starts and when it has ended."""

from __future__ import annotations

from typing import Any

import jax

from top_jax.training.plan import Plan
from top_jax.training.reporting import Reporter, Silence
from top_jax.training.run_directory import RunDirectory


def announce(plan: Plan, run: RunDirectory, reporter: Reporter | Silence, first_step: int) -> None:
    """Where, what, on what, and what may not be as meant."""
    config = plan.config
    start = f"going on after step {first_step}" if first_step else "starting"
    scan = "" if plan.scan is None else f", {plan.scan} scan"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    parts = f", weights in {config.fsdp} parts" if config.fsdp > 1 else ""
    reporter.say(
        f"{run.path}: {start}; {plan.total_steps} steps of {config.batch_size} images on {len(jax.devices())} x "
        f"{jax.devices()[0].device_kind}{processes}{parts}; {config.model.name}{scan}; "
        f"{plan.train_source.name} ({len(plan.train_source)} images to train, {len(plan.eval_source)} to evaluate)"
    )
    if plan.model.reduction.after_blocks and config.init_from is None and not first_step:
        reporter.say(
            "no init_from: the pruned model starts from random weights. The paper fine-tunes dense ones: "
            "--config.init_from=RUN_DIRECTORY or an official file (.pth, .safetensors)"
        )
    if len(plan.stages) > 1:
        stages = ", ".join(f"{_ratios(stage.reduction)} from step {stage.first_step}" for stage in plan.stages)
        reporter.say(f"keep ratio {stages}; evaluations are of the last")


def conclude(summary: dict[str, Any], plan: Plan, run: RunDirectory, reporter: Reporter | Silence) -> None:
    """What came of it."""
    stages = " -> ".join(str(n) for n in dict.fromkeys(summary["tokens_per_block"]))
    has_class_token = summary["tokens_per_block"][0] > plan.model.config.num_patches
    costs = ", ".join(
        f"{cost:.3g} of {summary['dense_gmacs'][name]:.3g} ({cost / summary['dense_gmacs'][name]:.1%}, {name})"
        for name, cost in summary["gmacs"].items()
    )
    average = f", averaged weights {summary['ema_accuracy']:.2%}" if "ema_accuracy" in summary else ""
    reporter.say(
        f"accuracy {summary['accuracy']:.2%}{average}, best {summary['best_accuracy']:.2%}; {summary['images']} images"
    )
    reporter.say(f"tokens per stage {stages}{' (class token included)' * has_class_token}; GMACs {costs}")
    if summary["skipped_batches"]:
        reporter.say(f"left out, because they gave numbers that are not finite: batches {summary['skipped_batches']}")
    reporter.say(
        f"{summary['train_images_per_second']:.1f} img/s training ({summary['data_wait']:.0%} of the time waiting for "
        f"data), {summary['images_per_second']:.1f} img/s evaluation on {summary['device']}; everything is in "
        f"{run.path}"
    )


def _ratios(reduction: Any) -> str:
    """(1.0, 0.9) as it is read; a dense model keeps everything."""
    return "/".join(f"{ratio:.3g}" for ratio in dict.fromkeys(reduction.ratios)) or "1"
