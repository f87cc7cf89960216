"""Images per second of a model on this machine: forward, and forward with all gradients, dense and pruned in turn.

python -m top_jax.evaluation.throughput [--model vim_tiny] [--batch 8] [--after-blocks 10 20] [--json FILE]

The weights are an argument of the compiled function, the input is synthetic, and the first round is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.models import Backbone, create_model
from top_jax.models.weights import Weights, split_weights, statistics_of, weights_of
from top_jax.pruning import Pruning


def forward(model: Backbone) -> tuple[Callable[..., Any], Weights]:
    """The compiled classifier and its weights."""
    graphdef = nnx.graphdef(model)
    return jax.jit(lambda weights, images: nnx.merge(graphdef, weights)(images)), weights_of(model)


def gradients(model: Backbone) -> tuple[Callable[..., Any], Weights]:
    """The compiled gradient of the mean logit by every parameter, and the weights."""
    graphdef, like = nnx.graphdef(model), statistics_of(model)

    @jax.jit
    def gradient(weights: Weights, images: jax.Array) -> Weights:
        params, stats = split_weights(weights, like)
        return jax.grad(lambda params: jnp.mean(nnx.merge(graphdef, params, stats)(images)))(params)

    return gradient, weights_of(model)


def measure(functions: dict[str, tuple[Callable[..., Any], Any]], images: jax.Array, repeats: int) -> dict[str, Any]:
    """Times all functions in turn; for each the median images per second and its quartiles."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, (run, weights) in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(run(weights, images))
            seconds[name].append(time.perf_counter() - start)
    rates = {name: len(images) / np.percentile(times[1:], (50, 75, 25)) for name, times in seconds.items()}
    return {
        name: {"images_per_second": round(float(rate[0]), 2), "quartiles": [round(float(r), 2) for r in rate[1:]]}
        for name, rate in rates.items()
    }


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--after-blocks", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--keep-ratio", type=float, default=0.85)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()

    pruning = Pruning(after_blocks=tuple(options.after_blocks), keep_ratio=options.keep_ratio)
    dense, pruned = create_model(options.model), create_model(options.model, pruning=pruning)
    images = jax.random.normal(jax.random.key(0), (options.batch, *dense.config.img_size, 3))
    rates = measure(
        {
            "forward, dense": forward(dense),
            "forward, pruned": forward(pruned),
            "gradients, dense": gradients(dense),
            "gradients, pruned": gradients(pruned),
        },
        images,
        options.repeats,
    )
    for name, rate in rates.items():
        low, high = rate["quartiles"]
        print(f"{name:20}{rate['images_per_second']:>8.2f} img/s   ({low:.2f} .. {high:.2f})")
    report = {
        "model": options.model,
        "batch": options.batch,
        "pruning": str(pruning),
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "rates": rates,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
