"""Times PlainMamba's depthwise convolution on a CPU: our shifted products against XLA's grouped convolution.

python -m tools.depthwise_conv [--batch 8] [--width 896] [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from top_jax.benchmark.timing import Rounds, Timing, over_sets, time_in_turn
from top_jax.environment import environment
from top_jax.files import save_json
from top_jax.models.depthwise_conv import grouped_conv2d, shifted_conv2d
from top_jax.tables import rows_as_text

VARIANTS = {"grouped (XLA's)": grouped_conv2d, "shifted (ours)": shifted_conv2d}


def time_convolutions(batch: int, width: int, *, side: int = 14, taps: int = 7) -> list[dict[str, Any]]:
    """Returns a row for each variant, forward and with both gradients, in float32."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (batch, side, side, width)), jax.random.normal(keys[1], (taps, taps, width))
    runs = {}
    for name, conv in VARIANTS.items():
        loss = lambda x, kernel, conv=conv: jnp.sum(jnp.square(conv(x, kernel)))  # noqa: E731
        runs[f"{name}, forward"] = over_sets(jax.jit(conv), [(x, kernel)])
        runs[f"{name}, with gradients"] = over_sets(jax.jit(jax.grad(loss, argnums=(0, 1))), [(x, kernel)])
    results = time_in_turn(runs, Rounds(most=7, seconds=60.0, measurement=0.0))
    return [{"run": name, **timing.row()} for name, timing in results.items() if isinstance(timing, Timing)]


def main() -> None:
    """Parses the command line, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--out", type=Path, help="also write the rows and the environment to this file, as JSON")
    options = parser.parse_args()

    rows = time_convolutions(options.batch, options.width)
    print(rows_as_text(rows))
    if options.out:
        about = {
            "environment": environment(),
            "batch": options.batch,
            "width": options.width,
            "grid": [14, 14],
            "taps": 7,
        }
        save_json(options.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
