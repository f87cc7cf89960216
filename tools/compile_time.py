"""Measures how long the models take to compile on this machine: forward, and a train step.

python -m tools.compile_time [--model vim_small --model plain_mamba_l3] [--batch 8] [--out FILE]

Tracing (Python) and compiling (XLA) are timed separately, one program after the other, without the persistent cache.
Weights are not needed, only their shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from top_jax.benchmark.programs import INFERENCE, TRAIN_STEP, lowering, make_batches
from top_jax.environment import environment
from top_jax.files import save_json
from top_jax.models import abstract_model
from top_jax.models.weights import weights_of
from top_jax.tables import rows_as_text

Row = dict[str, Any]


def time_compilation(name: str, batch: int) -> list[Row]:
    """Returns a row each for the forward and the train step (AdamW) of a model, in seconds."""
    model = abstract_model(name)
    sets = jax.eval_shape(lambda: make_batches(model, batch))
    return [
        {"model": name, "program": program, **_seconds(lowering(model, which, weights_of(model), sets[0]))}
        for program, which in (("forward", INFERENCE), ("train step", TRAIN_STEP))
    ]


def _seconds(lower: Callable[[], Any]) -> Row:
    start = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return {"trace_s": round(traced - start, 1), "compile_s": round(done - traced, 1), "sum_s": round(done - start, 1)}


def main() -> None:
    """Parses the command line, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="model name, repeatable (default: vim_small and plain_mamba_l3)"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the rows and the environment to this file, as JSON")
    options = parser.parse_args()

    rows = [
        row
        for name in options.model or ("vim_small", "plain_mamba_l3")
        for row in time_compilation(name, options.batch)
    ]
    print(rows_as_text(rows))
    if options.out:
        save_json(options.out, {"environment": environment(), "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
