"""Measures how long the models take to compile on this machine, and what running equal blocks as one loop saves.

python -m tools.compile_time [--model vim_small --model plain_mamba_l3] [--batch 8] [--turns 6] [--out FILE]

Each model's forward and its train step (AdamW) are compiled one after the other, without the persistent cache. The
train step is compiled twice: its equal blocks one by one, and as one loop (top_jax/models/block_loop.py). Tracing
(Python) and compiling (XLA) are timed separately. With --turns the two train steps then run in turn; the ratio is the
loop's time over the other's in the same turn (median and quartiles).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from top_jax.benchmark.programs import INFERENCE, TRAIN_STEP, lowering, make_batches, random_weights, run_of
from top_jax.benchmark.race import paired_speedup
from top_jax.benchmark.timing import Program, Rounds, Timing, time_in_turn
from top_jax.environment import environment
from top_jax.files import save_json
from top_jax.memory import program_memory
from top_jax.models import abstract_model, block_loop
from top_jax.models.weights import weights_of
from top_jax.tables import rows_as_text

Row = dict[str, Any]
ONE_BY_ONE, LOOP = "train step, blocks one by one", "train step"


def measure(name: str, batch: int, turns: int) -> list[Row]:
    """Returns a row each for the forward and the two train steps of a model: seconds, and MiB of the program."""
    model = abstract_model(name, drop_path=0.1)
    weights, sets = (random_weights(model), make_batches(model, batch)) if turns else (weights_of(model), None)
    example = sets[0] if sets else jax.eval_shape(lambda: make_batches(model, batch))[0]
    rows, programs = [], {}
    for program in ("forward", ONE_BY_ONE, LOOP):
        lower = lowering(model, INFERENCE if program == "forward" else TRAIN_STEP, weights, example)
        with _blocks_one_by_one() if program == ONE_BY_ONE else contextlib.nullcontext():
            compiled, seconds = _compile(lower)
        rows.append({"model": name, "program": program, **seconds, "program_mib": _mebibytes(compiled)})
        if program != "forward":
            programs[program] = Program(compiled, seconds["sum_s"])
    if sets:
        rounds = Rounds(most=turns, seconds=0, measurement=0, least=turns, settle=True)
        runs = {name: run_of(found, model, TRAIN_STEP, weights, sets) for name, found in programs.items()}
        timed = time_in_turn(runs, rounds)
        before, after = (_timing(timed[row["program"]]) for row in rows[1:])
        rows[1] |= before.row()
        rows[2] |= after.row() | {"ratio": [round(part, 3) for part in paired_speedup(after.each, before.each)]}
    return rows


@contextlib.contextmanager
def _blocks_one_by_one() -> Iterator[None]:
    shortest, block_loop.SHORTEST = block_loop.SHORTEST, sys.maxsize
    try:
        yield
    finally:
        block_loop.SHORTEST = shortest


def _compile(lower: Any) -> tuple[Any, Row]:
    start = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    parts = {"trace_s": traced - start, "compile_s": done - traced, "sum_s": done - start}
    return compiled, {name: round(seconds, 1) for name, seconds in parts.items()}


def _mebibytes(compiled: Any) -> float:
    return round(program_memory(compiled)["total"] / 2**20, 1)


def _timing(result: Timing | Exception) -> Timing:
    if isinstance(result, Exception):
        raise result
    return result


def main() -> None:
    """Parses the command line, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="model name, repeatable (default: vim_small and plain_mamba_l3)"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=0, help="steps of each of the two train steps that are timed")
    parser.add_argument("--out", type=Path, help="also write the rows and the environment to this file, as JSON")
    options = parser.parse_args()

    names = options.model or ("vim_small", "plain_mamba_l3")
    rows = [row for name in names for row in measure(name, options.batch, options.turns)]
    print(rows_as_text(rows))
    if options.out:
        save_json(options.out, {"environment": environment(), "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
