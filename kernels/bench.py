"""Times the scan's recurrence against what JAX offers without it, in one process, and prints a table.

python -m top_jax.kernels.bench [--json docs/results/NAME.json] [--length 197 785] [--repeats 15]

`plain` is a lax.scan over the tokens with the state as [B, N, E], `associative` a lax.associative_scan; both leave
their gradient to autodiff. `plain` and ours are run in turn, again and again, because the machine may be noisy; what
`associative` allocates would disturb its neighbours, so it runs by itself. Medians and quartiles are over the repeats.
`memory` is what XLA allocates beside arguments and results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .chunked_scan import ScanInputs, chunked_scan_backward, chunked_scan_forward, scan_forward

Scan = Callable[[ScanInputs, jax.Array], jax.Array]


def plain(inputs: ScanInputs, A: jax.Array) -> jax.Array:
    """The recurrence as one writes it down."""

    def step(h: jax.Array, now: ScanInputs) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(now.tau[:, None, :] * A) * h + now.B[:, :, None] * now.x[:, None, :]
        return h, jnp.einsum("bne,bn->be", h, now.C)

    h0 = jnp.zeros((inputs.x.shape[1], *A.shape), jnp.float32)
    return jax.lax.scan(step, h0, inputs)[1]


def associative(inputs: ScanInputs, A: jax.Array) -> jax.Array:
    """The recurrence as a parallel scan over pairs (decay, state)."""
    decay = jnp.exp(inputs.tau[:, :, None, :] * A)
    drive = inputs.B[..., None] * inputs.x[:, :, None, :]
    merge = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return jnp.einsum("lbne,lbn->lbe", jax.lax.associative_scan(merge, (decay, drive))[1], inputs.C)


def ours(inputs: ScanInputs, A: jax.Array) -> jax.Array:
    """`scan_forward`, which is what the op runs where no gradient is asked for."""
    return scan_forward(inputs, A, reverse=False)


def autodiff(scan: Scan) -> Callable[..., Any]:
    """Forward and every gradient of `scan`, by JAX."""
    return lambda inputs, A, dy: jax.vjp(scan, inputs, A)[1](dy)


def our_gradient(inputs: ScanInputs, A: jax.Array, dy: jax.Array) -> Any:
    """The chunked forward and its backward."""
    _, starts = chunked_scan_forward(inputs, A, reverse=False)
    return chunked_scan_backward(inputs, A, starts, dy, reverse=False)


def measure(functions: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], repeats: int) -> list[dict[str, Any]]:
    """Compiles all, then times them in turn; the first round is not counted."""
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.array(times[1:]) * 1e3, (25, 50, 75))
        memory = compiled[name].memory_analysis()
        assert memory is not None  # every backend with XLA reports it
        rows.append(
            {
                "name": name,
                "median_ms": round(float(middle), 2),
                "quartiles_ms": [round(float(low), 2), round(float(high), 2)],
                "memory_mib": round(memory.temp_size_in_bytes / 2**20, 1),
            }
        )
    return rows


def inputs_like_a_model(batch: int, length: int, width: int, states: int) -> tuple[ScanInputs, jax.Array, jax.Array]:
    """Random steps with time steps and decays of the size a ViM has."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, last: jax.random.normal(key, (length, batch, last))  # noqa: E731
    steps = ScanInputs(
        jax.nn.softplus(draw(keys[0], width) - 2), draw(keys[1], width), draw(keys[2], states), draw(keys[3], states)
    )
    A = -jnp.tile(jnp.arange(1, states + 1, dtype=jnp.float32)[:, None], (1, width))
    return steps, A, draw(keys[4], width)


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, nargs="+", default=[197])
    parser.add_argument("--width", type=int, default=384, help="E")
    parser.add_argument("--states", type=int, default=16, help="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    options = parser.parse_args()

    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "tables": [],
    }
    for length in options.length:
        steps, A, dy = inputs_like_a_model(options.batch, length, options.width, options.states)
        forward = measure({"plain": plain, "ours": ours}, (steps, A), options.repeats)
        forward += measure({"associative": associative}, (steps, A), options.repeats)
        functions = {"plain": autodiff(plain), "ours": our_gradient}
        backward = measure(functions, (steps, A, dy), options.repeats)
        backward += measure({"associative": autodiff(associative)}, (steps, A, dy), options.repeats)
        shape = f"B {options.batch}, L {length}, E {options.width}, N {options.states}"
        for title, rows in ((f"forward, {shape}", forward), (f"forward and gradients, {shape}", backward)):
            report["tables"].append({"title": title, "rows": rows})
            _print_table(title, rows)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':14}{'median':>10}{'quartiles':>22}{'plain / it':>12}{'memory':>12}")
    for row in rows:
        low, high = row["quartiles_ms"]
        ratio = rows[0]["median_ms"] / row["median_ms"]
        print(
            f"{row['name']:14}{row['median_ms']:>7.1f} ms{f'{low:.1f} .. {high:.1f} ms':>22}{ratio:>12.2f}"
            f"{row['memory_mib']:>8.1f} MiB"
        )


if __name__ == "__main__":
    main()
