"""Measures the scan and the models on this machine, or tunes the kernels for its GPU.

python -m top_jax.cli.benchmark --suite gpu --out FILE    contract, scans against their floor, models; under 8 minutes
python -m top_jax.cli.benchmark --suite cpu --out FILE    the part of it that needs no GPU
python -m top_jax.cli.benchmark --tune [--out FILE]       block sizes, into the table that the kernels read
"""

from __future__ import annotations

import math
from pathlib import Path

from absl import flags

from top_jax.cli import runner
from top_jax.errors import InputError, RunError

_SUITE = flags.DEFINE_enum("suite", None, ["gpu", "cpu"], "What to measure; gpu without a GPU is cpu, and says so.")
_TUNE = flags.DEFINE_boolean("tune", False, "Search the kernels' block sizes on this GPU.")
_OUT = flags.DEFINE_string("out", None, "JSON file: of the suite benchmark.json by default, of --tune its own place.")
_BUDGET = flags.DEFINE_float("budget", None, "Seconds that may be used; what does not fit is skipped by name.", 1.0)


def main(arguments: list[str]) -> None:
    """Measures or tunes."""
    runner.no_more(arguments)
    if _TUNE.value == (_SUITE.value is not None):
        raise InputError("--suite=gpu, --suite=cpu or --tune is needed, and only one of them (--help).")
    if _OUT.value == "" or (_BUDGET.value is not None and not math.isfinite(_BUDGET.value)):
        raise InputError(f"--out={_OUT.value!r} --budget={_BUDGET.value}: a file and a number of seconds are needed.")
    if _TUNE.value:
        from top_jax.benchmark import tuning

        tuning.tune(tuning.this_gpu(), None if _OUT.value is None else Path(_OUT.value), _BUDGET.value or tuning.BUDGET)
        return
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
