"""Says what this installation would run, and on what; with --data, what data it finds.

python -m top_jax.cli.doctor [--data --config configs/vim_s_top.py]
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from absl import flags
from ml_collections import config_flags

from top_jax.cli import config_flag, runner
from top_jax.config import RunConfig

_DATA = flags.DEFINE_boolean("data", False, "Open the config's data and decode a sample.")
_CONFIG = config_flags.DEFINE_config_file("config", None, f"{config_flag.HELP} Bundled digits if not given.")
_JSON = flags.DEFINE_string("json", None, "Write the report here too.")


def main(arguments: list[str]) -> None:
    """Collects and prints the report."""
    runner.no_more(arguments)
    config = RunConfig() if _CONFIG.value is None else config_flag.read(_CONFIG)
    report = installation()
    if _DATA.value:
        report["data"] = {split: _look_at(config, train=split == "train") for split in ("train", "eval")}
    print(json.dumps(report, indent=2))
    runner.write_json(_JSON.value, report)


def installation() -> dict[str, Any]:
    """Versions, devices, the scan that `auto` chooses, and what is missing for the rest."""
    from top_jax.ops.implementations import IMPLEMENTATIONS, choose, obstacle
    from top_jax.training.run_directory import environment

    choice = choose()
    optional = {
        "torch": "reading and writing .pth files: pip install 'top-jax[convert]'",
        "safetensors": "reading and writing .safetensors files: pip install safetensors",
    }
    return {
        **environment(),
        "selective_scan": {
            "auto": choice.name,
            "why": choice.why,
            "fix": choice.fix,
            "implementations": {name: obstacle(name) or "runs here" for name in IMPLEMENTATIONS if name != "auto"},
        },
        "missing": [need for name, need in optional.items() if importlib.util.find_spec(name) is None],
    }


def _look_at(config: RunConfig, *, train: bool, sample: int = 8) -> dict[str, Any]:
    from top_jax.data import eval_batches, open_source
    from top_jax.models import model_config

    source = open_source(config.data, train=train)
    size = model_config(config.model.name, **config.model.overrides()).img_size
    with eval_batches(source, config.data, img_size=size, batch_size=min(sample, len(source))) as batches:
        first = next(batches)
    return {
        "source": source.name,
        "images": len(source),
        "classes": source.num_classes,
        "first_images": list(first["image"].shape),
        "unreadable_among_them": list(batches.corrupt.values()),
    }


if __name__ == "__main__":
    runner.run(main)
