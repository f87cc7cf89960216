"""Evaluates a checkpoint on its config's evaluation split, every image counted once.

python -m top_jax.cli.evaluate --config configs/vim_s_top.py --checkpoint runs/a
python -m top_jax.cli.evaluate --config configs/vim_s_top.py --checkpoint vim_s.pth
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from top_jax import distributed
from top_jax.cli import checkpoint_flag, config_flag, distributed_flags, runner
from top_jax.config import RunConfig

_CONFIG, _CHECKPOINT = config_flag.define(), checkpoint_flag.define()
for _shared in (config_flag, checkpoint_flag, distributed_flags):  # so that --help shows them
    flags.adopt_module_key_flags(_shared)
_JSON = flags.DEFINE_string("json", None, "Where to write the result; by default beside the checkpoint.")


def main(arguments: list[str]) -> None:
    """Loads, evaluates, prints and writes JSON."""
    runner.no_more(arguments)
    config = config_flag.read(_CONFIG)
    runner.check_json(_JSON.value)
    distributed_flags.join()
    result = evaluate_checkpoint(config, Path(_CHECKPOINT.value))
    if distributed.is_primary():
        print(json.dumps(result, indent=2))
        runner.write_json(_JSON.value or _beside(Path(_CHECKPOINT.value)), result)


def evaluate_checkpoint(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Accuracy and cost of a checkpoint under the config's model, pruning and data."""
    from top_jax.data import open_source
    from top_jax.evaluation.accuracy import evaluate_model
    from top_jax.evaluation.flops import count_macs

    source = open_source(config.data, train=False)
    model = checkpoint_flag.load_model(checkpoint, config)
    with runner.progress(f"evaluating on {source.name}", len(source)) as advance:
        result = evaluate_model(
            model, source, config.data, batch_size=config.eval_batch_size or config.batch_size, on_batch=advance
        )
    cost, dense = count_macs(model.config, model.reduction), count_macs(model.config)
    return {
        "checkpoint": str(checkpoint),
        "data": source.name,
        **result,
        "tokens_per_block": list(cost.tokens_per_block),
        "gmacs": {name: cost.gmacs(name) for name in cost.macs},
        "dense_gmacs": {name: dense.gmacs(name) for name in dense.macs},
        "device": jax.devices()[0].device_kind,
    }


def _beside(checkpoint: Path) -> Path:
    """runs/a/evaluation.json, or vim_s.pth.evaluation.json beside vim_s.pth."""
    return checkpoint / "evaluation.json" if checkpoint.is_dir() else Path(f"{checkpoint}.evaluation.json")


if __name__ == "__main__":
    runner.run(main)
