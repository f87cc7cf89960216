"""Measures a config's model, or the scan and the models, on this machine, or tunes the kernels for its GPU.

top-jax benchmark --config configs/vim_s_top.py    dense, pruned, every alignment and a DeiT, in turn
top-jax benchmark --config seg_vim_t_top --train   a segmenter: crops to labels, and the train step; no DeiT
top-jax benchmark --suite gpu --out FILE    correctness, scans against the GPU's limits, models; under 6 minutes
top-jax benchmark --suite cpu --out FILE    small versions of the same parts, for a CPU
top-jax benchmark --tune [--out FILE]       searches block sizes, writes the table that the kernels read

With --config it prints latency, images per second, memory, and the speed-up over the dense model next to the ratio of
multiply-accumulates (for a segmenter also that of its backbone). Batch sizes are 1, 8, 32, 64, ... as far as memory and
--budget allow, or --batch_sizes. Weights are random. --config.model.dtype=float32 measures in another dtype.
--suite gpu takes up to 6 minutes, --tune up to 4.
"""

from __future__ import annotations

import math
from pathlib import Path

from absl import flags

from top_jax.cli import config_file, runner, shared_flags, terminal
from top_jax.errors import InputError, RunError

_CONFIG = shared_flags.define_config(required=False)
_SUITE = flags.DEFINE_enum(
    "suite", None, ["gpu", "cpu"], "Suite to measure; gpu on a machine without a GPU runs the cpu suite and says so."
)
_TUNE = flags.DEFINE_boolean("tune", False, "Search the kernels' block sizes on this GPU.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "JSON file for the results; by default benchmark.json (--suite), benchmark_NAME.json (--config) or the "
    "kernels' table (--tune).",
)
_BUDGET = flags.DEFINE_float(
    "budget",
    None,
    "Seconds to use; what does not fit is listed as skipped. Default: 330 for a suite, 200 to tune, and for a config "
    "80 on a CPU and 450 on a GPU.",
    1.0,
)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "With --config: batch sizes to measure, such as 1,8.")
_TRAIN = flags.DEFINE_boolean("train", False, "With --config: measure the training step too.")


def main(arguments: list[str]) -> None:
    """Measures a config or a suite, or tunes the kernels."""
    runner.no_more(arguments)
    if (_CONFIG.value is not None) + (_SUITE.value is not None) + _TUNE.value != 1:
        raise InputError("pass exactly one of --config=FILE, --suite=gpu, --suite=cpu and --tune (--help).")
    if _CONFIG.value is not None:
        _measure_config()
        return
    if _BATCH_SIZES.value is not None or _TRAIN.value:
        flag = "--train" if _TRAIN.value else "--batch_sizes"
        raise InputError(f"{flag} needs --config=FILE; pass a config, or drop {flag}.")
    if _TUNE.value:
        from top_jax.benchmark import tuning

        tuning.tune(tuning.this_gpu(), None if _OUT.value is None else Path(_OUT.value), _BUDGET.value or tuning.BUDGET)
        return
    _run_suite()


def _measure_config() -> None:
    from top_jax.benchmark import compare
    from top_jax.build import build_reduction, crop_size

    config = shared_flags.read_config(_CONFIG)
    sizes = None if _BATCH_SIZES.value is None else compare.batch_sizes(_BATCH_SIZES.value)
    reduction = build_reduction(config.pruning)
    seconds, file = (
        _BUDGET.value or compare.budget(),
        Path(_OUT.value or f"benchmark_{config_file.config_name()}.json"),
    )
    with terminal.progress(f"measuring {config.model.name}", math.ceil(seconds)) as advance:
        report = compare.compare(
            config.model,
            reduction,
            file=file,
            img_size=crop_size(config),
            about={"config": config_file.config_name(), "pruning": str(reduction)},
            sizes=sizes,
            train=_TRAIN.value,
            seconds=seconds,
            advance=advance,
        )
    print(f"\n{compare.as_text(report)}\n\n{file} has every time.")


def _run_suite() -> None:
    if _SUITE.value == "cpu":
        import jax

        jax.config.update("jax_platforms", "cpu")
    from top_jax.benchmark import suite

    file = Path(_OUT.value or "benchmark.json")
    failed = suite.run_suite(file, _BUDGET.value or suite.BUDGET)
    if failed:
        raise RunError(
            f"{len(failed)} parts failed ({', '.join(failed)}); {file} has their errors and the results of the others."
        )


if __name__ == "__main__":
    runner.run(main)
