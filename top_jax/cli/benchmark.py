"""Measures a config's model, or the scan and the models, on this machine, or tunes the kernels for its GPU.

python -m top_jax.cli.benchmark --config configs/vim_s_top.py       dense, pruned, every alignment and a DeiT in turn
python -m top_jax.cli.benchmark --suite gpu --out FILE    contract, scans against their floor, models; under 8 minutes
python -m top_jax.cli.benchmark --suite cpu --out FILE    the part of it that needs no GPU
python -m top_jax.cli.benchmark --tune [--out FILE]       block sizes, into the table that the kernels read

Of a config: latency, images per second, memory and the speed-up over the dense model beside the ratio of
multiply-accumulates, at the batch sizes 1, 8, 32, 64, ... that fit in memory and in --budget, or at --batch_sizes; the
weights are random. --config.model.dtype=float32 measures in another dtype. Without ml_collections there is no --config.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from absl import flags

from top_jax.cli import runner
from top_jax.errors import InputError, RunError

_HAS_CONFIGS = importlib.util.find_spec("ml_collections") is not None  # a borrowed GPU may have little more than JAX
if _HAS_CONFIGS:
    from top_jax.cli import config_flag

    _CONFIG = config_flag.define(required=False)
    flags.adopt_module_key_flags(config_flag)
else:
    _CONFIG = flags.DEFINE_string("config", None, "Needs ml_collections, which is not installed.")
_SUITE = flags.DEFINE_enum("suite", None, ["gpu", "cpu"], "What to measure; gpu without a GPU is cpu, and says so.")
_TUNE = flags.DEFINE_boolean("tune", False, "Search the kernels' block sizes on this GPU.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "JSON file: by default benchmark.json of the suite, benchmark_NAME.json of a config, and of --tune its own place.",
)
_BUDGET = flags.DEFINE_float(
    "budget", None, "Seconds that may be used; what does not fit is skipped by name. Of a config 80, on a GPU 450.", 1.0
)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "Of a config: these only, such as 1,8.")
_TRAIN = flags.DEFINE_boolean("train", False, "Of a config: the train step too.")


def main(arguments: list[str]) -> None:
    """Measures or tunes."""
    runner.no_more(arguments)
    if (_CONFIG.value is not None) + (_SUITE.value is not None) + _TUNE.value != 1:
        raise InputError("--config=FILE, --suite=gpu, --suite=cpu or --tune is needed, and only one of them (--help).")
    if _OUT.value == "" or (_BUDGET.value is not None and not math.isfinite(_BUDGET.value)):
        raise InputError(f"--out={_OUT.value!r} --budget={_BUDGET.value}: a file and a number of seconds are needed.")
    if _CONFIG.value is not None:
        _measure_config()
        return
    if _BATCH_SIZES.value is not None or _TRAIN.value:
        flag = "--train" if _TRAIN.value else "--batch_sizes"
        raise InputError(f"{flag} is of a config's benchmark; pass --config=FILE instead, or drop it.")
    if _TUNE.value:
        from top_jax.benchmark import tuning

        tuning.tune(tuning.this_gpu(), None if _OUT.value is None else Path(_OUT.value), _BUDGET.value or tuning.BUDGET)
        return
    _run_suite()


def _measure_config() -> None:
    if not _HAS_CONFIGS:
        raise InputError("--config needs ml_collections: pip install ml_collections (--suite and --tune do without).")
    from top_jax.benchmark import compare, compare_text
    from top_jax.build import build_reduction
    from top_jax.cli import config_flag

    config = config_flag.read(_CONFIG)
    sizes = None if _BATCH_SIZES.value is None else compare.batch_sizes(_BATCH_SIZES.value)
    reduction = build_reduction(config.pruning)
    seconds, file = _BUDGET.value or compare.budget(), Path(_OUT.value or f"benchmark_{config_flag.name()}.json")
    with runner.progress(f"measuring {config.model.name}", math.ceil(seconds)) as advance:
        report = compare.compare(
            config.model.name,
            reduction,
            config.model.overrides(),
            file=file,
            about={"config": config_flag.name(), "pruning": str(reduction)},
            sizes=sizes,
            train=_TRAIN.value,
            seconds=seconds,
            advance=advance,
        )
    print(f"\n{compare_text.text(report)}\n\n{file} has every time.")


def _run_suite() -> None:
    if _SUITE.value == "cpu":
        import jax

        jax.config.update("jax_platforms", "cpu")
    from top_jax.benchmark import suite

    file = Path(_OUT.value or "benchmark.json")
    failed = suite.run_suite(file, _BUDGET.value or suite.BUDGET)
    if failed:
        raise RunError(
            f"{len(failed)} parts failed ({', '.join(failed)}); {file} has their errors, and what the rest measured."
        )


if __name__ == "__main__":
    runner.run(main)
