"""Times the scan's recurrence against what JAX and PyTorch offer without it, in one process, and prints tables.

python -m tools.scan_on_a_cpu [--json docs/results/NAME.json] [--length 197 785 3136] [--repeats 15] [--seconds 6]

`plain` is a lax.scan over the tokens with the state as [B, N, E], `associative` a lax.associative_scan; both leave
their gradient to autodiff. `torch loop` is Mamba's published reference on the CPU, where PyTorch is installed. `plain`
and ours are run in turn, again and again, because the machine may be noisy: twice each, and the second time counts,
because the first pays for what the other left in the caches. `associative` and `torch loop` run by themselves, because
what they allocate would disturb any neighbour. The first round warms up; medians and quartiles are over the others, at
most --repeats and at least one, and no new round is begun after --seconds. `memory` is what XLA allocates beside
arguments and results; PyTorch does not say, hence the dash.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.ops.xla import Steps, chunked_scan_backward, chunked_scan_forward, scan_forward
from top_jax.optional import optional_package

# Indexing a tensor at each step, as the reference does, gives autograd a gradient of the whole tensor per step. That is
# quadratic in L: seconds at a ViM's 197 tokens, 16 times as many at 785.
LONGEST_TORCH_GRADIENT = 200

Scan = Callable[[Steps, jax.Array], jax.Array]
Row = dict[str, Any]


class Rounds(NamedTuple):
    """How often a group is run.

    Attributes:
        most: rounds that count.
        seconds: no new round is begun after them, but one is always counted.
    """

    most: int
    seconds: float


def plain(inputs: Steps, A: jax.Array) -> jax.Array:
    """The recurrence as one writes it down."""

    def step(h: jax.Array, now: Steps) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(now.tau[:, None, :] * A[None]) * h + now.B[:, :, None] * now.x[:, None, :]
        return h, jnp.einsum("bne,bn->be", h, now.C)

    h0 = jnp.zeros((inputs.x.shape[1], *A.shape), jnp.float32)
    return jax.lax.scan(step, h0, inputs)[1]


def associative(inputs: Steps, A: jax.Array) -> jax.Array:
    """The recurrence as a parallel scan over pairs (decay, state)."""
    decay = jnp.exp(inputs.tau[:, :, None, :] * A[None, None])
    drive = inputs.B[..., None] * inputs.x[:, :, None, :]
    merge = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return jnp.einsum("lbne,lbn->lbe", jax.lax.associative_scan(merge, (decay, drive))[1], inputs.C)


def ours(inputs: Steps, A: jax.Array) -> jax.Array:
    """`scan_forward`, which is what the op runs where no gradient is asked for."""
    return scan_forward(inputs, A, reverse=False)


def autodiff(scan: Scan) -> Callable[..., Any]:
    """Forward and every gradient of `scan`, by JAX."""
    return lambda inputs, A, dy: jax.vjp(scan, inputs, A)[1](dy)


def our_gradient(inputs: Steps, A: jax.Array, dy: jax.Array) -> Any:
    """The chunked forward and its backward."""
    _, starts = chunked_scan_forward(inputs, A, reverse=False)
    return chunked_scan_backward(inputs, A, starts, dy, reverse=False)


def _torch() -> Any:
    return optional_package("torch", purpose="the PyTorch loop", install="torch")


def torch_loop(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    """Mamba's reference on float32 tensors in its own layout; delta is after softplus.

    u and delta `[B, E, L]`, A `[E, N]`, B and C `[B, N, L]`, result `[B, E, L]`.

    Source: mamba_ssm/ops/selective_scan_interface.py, `selective_scan_ref`.
    """
    torch = _torch()

    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = A.new_zeros((u.shape[0], *A.shape))
    ys = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + drive[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return torch.stack(ys, dim=2)


def torch_inputs(inputs: Steps, A: jax.Array) -> tuple[Any, ...]:
    """The arguments of `torch_loop` for which it computes what ours compute; they ask for gradients."""
    torch = _torch()

    layout = lambda a: torch.tensor(np.moveaxis(np.asarray(a), 0, -1).copy(), requires_grad=True)  # noqa: E731
    return (*(layout(a) for a in (inputs.x / inputs.tau, inputs.tau, A, inputs.B, inputs.C)),)


def measure_jax(functions: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], rounds: Rounds) -> list[Row]:
    """Compiles all, then times them in turn."""
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    rows = in_turn({name: _runner(run, arguments) for name, run in compiled.items()}, rounds)
    for row in rows:
        memory = compiled[row["name"]].memory_analysis()
        assert memory is not None  # every backend with XLA reports it
        row["memory_mib"] = round(memory.temp_size_in_bytes / 2**20, 1)
    return rows


def measure_torch(inputs: Steps, A: jax.Array, dy: jax.Array | None, rounds: Rounds) -> list[Row]:
    """The row of `torch_loop`, with gradients where dy is given, or one that says why there is none."""
    if importlib.util.find_spec("torch") is None:
        return [{"name": "torch loop", "absent": "PyTorch is not installed"}]
    if dy is not None and len(dy) > LONGEST_TORCH_GRADIENT:
        return [{"name": "torch loop", "absent": "not run: quadratic in L"}]
    torch = _torch()

    arguments = torch_inputs(inputs, A)
    if dy is None:
        run = torch.no_grad()(lambda: torch_loop(*arguments))
    else:
        cotangent = torch.tensor(np.moveaxis(np.asarray(dy), 0, -1).copy())
        run = lambda: torch.autograd.grad(torch_loop(*arguments), arguments, cotangent)  # noqa: E731
    return in_turn({"torch loop": run}, rounds)


def in_turn(runs: dict[str, Callable[[], Any]], rounds: Rounds) -> list[Row]:
    """Runs all in turn, round after round, and returns the row of each; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    counted = -1
    while counted < 1 or (counted < rounds.most and time.perf_counter() - begun < rounds.seconds):
        for name, run in runs.items():
            if len(runs) > 1:
                run()  # finds caches and heap as the one before left them, so it is not timed
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        counted += 1
    rows: list[Row] = []
    for name, times in seconds.items():
        low, middle, high = (round(float(ms), 2) for ms in np.percentile(np.array(times[1:]) * 1e3, (25, 50, 75)))
        rows.append({"name": name, "median_ms": middle, "quartiles_ms": [low, high], "rounds": counted})
    return rows


def inputs_like_a_model(batch: int, length: int, width: int, states: int) -> tuple[Steps, jax.Array, jax.Array]:
    """Random steps with time steps and decays of the size a ViM has."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, last: jax.random.normal(key, (length, batch, last))  # noqa: E731
    steps = Steps(
        jax.nn.softplus(draw(keys[0], width) - 2), draw(keys[1], width), draw(keys[2], states), draw(keys[3], states)
    )
    A = -jnp.tile(jnp.arange(1, states + 1, dtype=jnp.float32)[:, None], (1, width))
    return steps, A, draw(keys[4], width)


def tables(batch: int, length: int, width: int, states: int, rounds: Rounds) -> list[dict[str, Any]]:
    """The forward's table and the gradients', at one size."""
    steps, A, dy = inputs_like_a_model(batch, length, width, states)
    forward = measure_jax({"plain": plain, "ours": ours}, (steps, A), rounds)
    forward += measure_jax({"associative": associative}, (steps, A), rounds)
    forward += measure_torch(steps, A, None, rounds)
    gradients = measure_jax({"plain": autodiff(plain), "ours": our_gradient}, (steps, A, dy), rounds)
    gradients += measure_jax({"associative": autodiff(associative)}, (steps, A, dy), rounds)
    gradients += measure_torch(steps, A, dy, rounds)
    for row in forward + gradients:
        if "median_ms" in row:
            row["us_per_token"] = round(row["median_ms"] * 1e3 / (batch * length), 3)
    size = {"batch": batch, "length": length, "width": width, "states": states}
    return [{"pass": "forward", **size, "rows": forward}, {"pass": "forward and gradients", **size, "rows": gradients}]


def growth(batch: int, lengths: list[int], width: int, states: int, rounds: Rounds) -> list[dict[str, Any]]:
    """Time of a token at each length, relative to the shortest: 1 is a cost linear in L. Lengths are run in turn."""
    found = []
    for kind, function in (("forward", ours), ("forward and gradients", our_gradient)):
        runs = {}
        for length in sorted(set(lengths)):
            arguments = inputs_like_a_model(batch, length, width, states)[: 2 if function is ours else 3]
            runs[str(length)] = _runner(jax.jit(function).lower(*arguments).compile(), arguments)
        per_token = {row["name"]: row["median_ms"] / int(row["name"]) for row in in_turn(runs, rounds)}
        shortest = next(iter(per_token.values()))
        found.append({"pass": kind, "of_linear": {name: round(time / shortest, 2) for name, time in per_token.items()}})
    return found


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, nargs="+", default=[197, 785, 3136])
    parser.add_argument("--width", type=int, default=384, help="E")
    parser.add_argument("--states", type=int, default=16, help="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=6, help="for each group of functions")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    options = parser.parse_args()
    if min(options.batch, *options.length, options.width, options.states, options.repeats) < 1:
        parser.error("every size and the number of repeats must be at least 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")

    rounds = Rounds(options.repeats, options.seconds)
    report = {**_setting(), "tables": []}
    for length in options.length:
        for table in tables(options.batch, length, options.width, options.states, rounds):
            report["tables"].append(table)
            _print_table(table)
    report["growth"] = growth(options.batch, options.length, options.width, options.states, rounds)
    print("\nours, time of a token relative to the shortest length (1 = linear in L)")
    for line in report["growth"]:
        print(f"{line['pass']}: " + ", ".join(f"L {length} {ratio}" for length, ratio in line["of_linear"].items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _runner(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(*arguments))


def _setting() -> dict[str, Any]:
    torch = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None
    return {
        "device": jax.devices()[0].device_kind,
        "machine": _processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, else the kind of machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _print_table(table: dict[str, Any]) -> None:
    print("\n{pass}, B {batch}, L {length}, E {width}, N {states}".format(**table))
    print(f"{'':12}{'median':>13}{'quartiles':>24}{'per token':>14}{'it / ours':>12}{'memory':>14}")
    (our_ms,) = (row["median_ms"] for row in table["rows"] if row["name"] == "ours")
    for row in table["rows"]:
        if "absent" in row:
            print(f"{row['name']:12}  {row['absent']}")
            continue
        quartiles = "{:.1f} .. {:.1f} ms".format(*row["quartiles_ms"])
        memory = f"{row['memory_mib']:.1f} MiB" if "memory_mib" in row else "-"
        print(
            f"{row['name']:12}{row['median_ms']:>10.1f} ms{quartiles:>24}{row['us_per_token']:>11.2f} us"
            f"{row['median_ms'] / our_ms:>12.2f}{memory:>14}"
        )


if __name__ == "__main__":
    main()
