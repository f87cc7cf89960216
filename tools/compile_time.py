"""How long the models take to compile here: forward, and a train step.

python -m tools.compile_time [--model vim_small --model plain_mamba_l3] [--batch 8] [--out FILE]

Tracing (Python) and compiling (XLA) apart, one program after the other, without the persistent cache. Weights are not
needed, only their shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.benchmark.programs import make_inference, make_train_step
from top_jax.benchmark.report import publish
from top_jax.models import abstract_model
from top_jax.models.weights import split_weights, statistics_of, weights_of

Row = dict[str, Any]


def time_compilation(name: str, batch: int) -> list[Row]:
    """A row each for forward and train step (AdamW) of the named model, in seconds."""
    model, optimizer = abstract_model(name), optax.adamw(1e-4)
    weights = weights_of(model)
    params, _ = split_weights(weights, like=statistics_of(model))
    state = jax.eval_shape(optimizer.init, params)
    images = jax.ShapeDtypeStruct((batch, *model.config.img_size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    forward, step = make_inference(nnx.graphdef(model)), make_train_step(model, optimizer)
    return [
        {"model": name, "program": "forward", **_seconds(forward, weights, images)},
        {"model": name, "program": "train step", **_seconds(step, weights, state, images, labels)},
    ]


def _seconds(function: Callable[..., Any], *arguments: Any) -> Row:
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return {"trace_s": round(traced - start, 1), "compile_s": round(done - traced, 1), "sum_s": round(done - start, 1)}


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="model name; repeatable (vim_small and plain_mamba_l3)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the rows and the machine as JSON here too")
    options = parser.parse_args()

    rows = [
        row
        for name in options.model or ("vim_small", "plain_mamba_l3")
        for row in time_compilation(name, options.batch)
    ]
    publish(rows, options.out, batch=options.batch)


if __name__ == "__main__":
    main()
