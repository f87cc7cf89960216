"""Times the scan's recurrence against alternatives in JAX and PyTorch, in one process, and prints tables.

python -m tools.scan_on_a_cpu [--json docs/results/NAME.json] [--length 197 785 3136] [--repeats 15] [--seconds 6]

`plain` is a lax.scan over the tokens with the state as [B, N, E], `associative` a lax.associative_scan; both leave
their gradient to autodiff. `torch loop` is Mamba's published reference on the CPU, if PyTorch is installed. `plain` and
ours are timed in turn, because the machine may be noisy. Each is called twice and the second call is timed, because the
first pays for what the other left in the caches. `associative` and `torch loop` are timed alone, because their
allocations would disturb other measurements. Medians and quartiles are over at most --repeats rounds and at least one;
no round starts after --seconds. `memory` is what XLA allocates besides arguments and results; PyTorch does not report
it.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.benchmark.timing import Rounds, Row, Run, over_sets, time_in_turn
from top_jax.environment import environment
from top_jax.files import save_json
from top_jax.memory import program_memory
from top_jax.ops.xla import Steps, chunked_scan_backward, chunked_scan_forward, scan_forward
from top_jax.optional import optional_package
from top_jax.tables import rows_as_text

# The reference indexes a tensor at each step, so autograd makes a gradient of the whole tensor per step. That is
# quadratic in L: seconds at a ViM's 197 tokens, 16 times that at 785.
LONGEST_TORCH_GRADIENT = 200

Scan = Callable[[Steps, jax.Array], jax.Array]


def plain(inputs: Steps, A: jax.Array) -> jax.Array:
    """Computes the recurrence with `lax.scan`."""

    def step(h: jax.Array, now: Steps) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(now.tau[:, None, :] * A[None]) * h + now.B[:, :, None] * now.x[:, None, :]
        return h, jnp.einsum("bne,bn->be", h, now.C)

    h0 = jnp.zeros((inputs.x.shape[1], *A.shape), jnp.float32)
    return jax.lax.scan(step, h0, inputs)[1]


def associative(inputs: Steps, A: jax.Array) -> jax.Array:
    """Computes the recurrence as a parallel scan over pairs (decay, state)."""
    decay = jnp.exp(inputs.tau[:, :, None, :] * A[None, None])
    drive = inputs.B[..., None] * inputs.x[:, :, None, :]
    merge = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return jnp.einsum("lbne,lbn->lbe", jax.lax.associative_scan(merge, (decay, drive))[1], inputs.C)


def ours(inputs: Steps, A: jax.Array) -> jax.Array:
    """Computes the recurrence with `scan_forward`, which the op runs if no gradient is needed."""
    return scan_forward(inputs, A, reverse=False)


def autodiff(scan: Scan) -> Callable[..., Any]:
    """Returns a function that computes every gradient of `scan` by autodiff."""
    return lambda inputs, A, dy: jax.vjp(scan, inputs, A)[1](dy)


def our_gradient(inputs: Steps, A: jax.Array, dy: jax.Array) -> Any:
    """Computes the chunked forward and its backward."""
    _, starts = chunked_scan_forward(inputs, A, reverse=False)
    return chunked_scan_backward(inputs, A, starts, dy, reverse=False)


def _torch() -> Any:
    return optional_package("torch", purpose="the PyTorch loop", install="torch")


def torch_loop(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    """Computes Mamba's reference on float32 tensors in its own layout; delta is after softplus.

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
    """Returns the arguments of `torch_loop` that are equivalent to ours, with gradients required."""
    torch = _torch()

    layout = lambda a: torch.tensor(np.moveaxis(np.asarray(a), 0, -1).copy(), requires_grad=True)  # noqa: E731
    return (*(layout(a) for a in (inputs.x / inputs.tau, inputs.tau, A, inputs.B, inputs.C)),)


def measure_jax(functions: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], rounds: Rounds) -> list[Row]:
    """Compiles all functions, times them in turn, and returns a row for each."""
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    rows = timed_rows({name: over_sets(run, [arguments]) for name, run in compiled.items()}, rounds)
    for row in rows:
        row["memory_mib"] = round(program_memory(compiled[row["name"]])["temporaries"] / 2**20, 1)
    return rows


def measure_torch(inputs: Steps, A: jax.Array, dy: jax.Array | None, rounds: Rounds) -> list[Row]:
    """Returns the row of `torch_loop`, with gradients if dy is given, or a row that says why it was not timed."""
    if importlib.util.find_spec("torch") is None:
        return [{"name": "torch loop", "absent": "PyTorch is not installed"}]
    if dy is not None and len(dy) > LONGEST_TORCH_GRADIENT:
        return [{"name": "torch loop", "absent": "not run: quadratic in L"}]
    torch = _torch()

    arguments = torch_inputs(inputs, A)
    if dy is None:
        run = torch.no_grad()(lambda number: torch_loop(*arguments))
    else:
        cotangent = torch.tensor(np.moveaxis(np.asarray(dy), 0, -1).copy())
        run = lambda number: torch.autograd.grad(torch_loop(*arguments), arguments, cotangent)  # noqa: E731
    return timed_rows({"torch loop": run}, rounds)


def timed_rows(runs: dict[str, Run], rounds: Rounds) -> list[Row]:
    """Times functions in turn and returns a row for each. A function that raises ends the program."""
    rows: list[Row] = []
    for name, result in time_in_turn(runs, rounds).items():
        if isinstance(result, Exception):
            raise result
        rows.append({"name": name, **result.row()})
    return rows


def inputs_like_a_model(batch: int, length: int, width: int, states: int) -> tuple[Steps, jax.Array, jax.Array]:
    """Draws inputs with time steps and decays of the size that a ViM has, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, last: jax.random.normal(key, (length, batch, last))  # noqa: E731
    steps = Steps(
        jax.nn.softplus(draw(keys[0], width) - 2), draw(keys[1], width), draw(keys[2], states), draw(keys[3], states)
    )
    A = -jnp.tile(jnp.arange(1, states + 1, dtype=jnp.float32)[:, None], (1, width))
    return steps, A, draw(keys[4], width)


def tables(batch: int, length: int, width: int, states: int, rounds: Rounds) -> list[dict[str, Any]]:
    """Returns the table of the forward pass and that of the gradients, at one size."""
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
    """Returns the time per token at each length, relative to the shortest; 1 is linear in L. They are timed in turn."""
    found = []
    for kind, function in (("forward", ours), ("forward and gradients", our_gradient)):
        runs = {}
        for length in sorted(set(lengths)):
            arguments = inputs_like_a_model(batch, length, width, states)[: 2 if function is ours else 3]
            runs[str(length)] = over_sets(jax.jit(function).lower(*arguments).compile(), [arguments])
        milliseconds = {int(row["name"]): row["median_ms"] for row in timed_rows(runs, rounds)}
        found.append({"pass": kind, "of_linear": relative_to_linear(milliseconds)})
    return found


def relative_to_linear(milliseconds: dict[int, float]) -> dict[str, float]:
    """Returns the time per token at each length over that at the first length."""
    per_token = {length: time / length for length, time in milliseconds.items()}
    shortest = next(iter(per_token.values()))
    return {str(length): round(time / shortest, 2) for length, time in per_token.items()}


def main() -> None:
    """Parses the command line, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, nargs="+", default=[197, 785, 3136])
    parser.add_argument("--width", type=int, default=384, help="E")
    parser.add_argument("--states", type=int, default=16, help="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=6, help="time limit of each group of functions")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if min(options.batch, *options.length, options.width, options.states, options.repeats) < 1:
        parser.error("every size and the number of repeats must be at least 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.parent} does not exist")

    rounds = Rounds(options.repeats, options.seconds, measurement=0.0, settle=True)
    report = {"environment": environment(), "tables": []}
    for length in options.length:
        for table in tables(options.batch, length, options.width, options.states, rounds):
            report["tables"].append(table)
            _print_table(table)
    report["growth"] = growth(options.batch, options.length, options.width, options.states, rounds)
    print("\nours, time per token relative to the shortest length (1 = linear in L)")
    for line in report["growth"]:
        print(f"{line['pass']}: " + ", ".join(f"L {length} {ratio}" for length, ratio in line["of_linear"].items()))
    if options.json:
        save_json(options.json, report)


def _print_table(table: dict[str, Any]) -> None:
    print("\n{pass}, B {batch}, L {length}, E {width}, N {states}".format(**table))
    (our_ms,) = (row["median_ms"] for row in table["rows"] if row["name"] == "ours")
    ratios = [{"it / ours": row["median_ms"] / our_ms} if "median_ms" in row else {} for row in table["rows"]]
    print(rows_as_text([row | ratio for row, ratio in zip(table["rows"], ratios, strict=True)]))


if __name__ == "__main__":
    main()
