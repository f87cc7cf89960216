"""Converts an official PyTorch checkpoint into a run directory that every other command reads.

python -m top_jax.cli.convert vim_s.pth runs/vim_s --model vim_small [--override embed_dim=64 ...]
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from absl import flags

from top_jax.cli import runner
from top_jax.config import RunConfig
from top_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", None, "Model name, such as vim_small.", required=True)
_OVERRIDE = flags.DEFINE_multi_string("override", [], "A size other than the named model's, as key=value; repeatable.")
_EMA = flags.DEFINE_boolean("ema", False, "Take the file's averaged weights, model_ema.")


def main(arguments: list[str]) -> None:
    """Reads, checks every key, writes."""
    if len(arguments) != 2:
        raise InputError(f"got {len(arguments)} arguments; needed: SOURCE.pth and the TARGET directory (--help).")
    source, target = (Path(argument) for argument in arguments)
    config = _run_config(_MODEL.value, _OVERRIDE.value)

    from flax import nnx

    from top_jax.convert import load_torch_checkpoint
    from top_jax.training.checkpoints import save_weights
    from top_jax.training.run_directory import RunDirectory

    run = RunDirectory(target)
    if run.has_checkpoints():
        raise InputError(f"{run.path} already holds checkpoints; choose another directory, or delete that one.")
    model = load_torch_checkpoint(source, config.model.name, ema=_EMA.value, **config.model.overrides())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    run.claim(config)
    save_weights(run, params)
    report = {"source": str(source), "target": str(run.path), "ema": _EMA.value, **_sizes(params)}
    run.write_json("conversion.json", report)
    print(json.dumps(report, indent=2))
    print("every key of the file is used and every parameter is set; the command that reads it, for example:")
    print(f"  python -m top_jax.cli.evaluate --config configs/vim_s.py --checkpoint {target}")


def _run_config(name: str, overrides: list[str]) -> RunConfig:
    settings: dict[str, object] = {"name": name}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"--override={override}; needed: key=value, such as embed_dim=64.")
        settings[key] = _literal(value)
    return RunConfig.from_config_dict({"model": settings})


def _literal(text: str) -> object:
    """64, (224, 320), 0.1 and True as values; anything else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _sizes(params: object) -> dict[str, int]:
    import jax

    leaves = jax.tree.leaves(params)
    return {"arrays": len(leaves), "parameters": sum(leaf.size for leaf in leaves)}


if __name__ == "__main__":
    runner.run(main)
