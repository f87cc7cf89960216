"""Times the scan's implementations on one case, forward and with all gradients, against the floor and the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from top_jax.benchmark.associative import STATES_KEPT, associative_scan
from top_jax.benchmark.cases import Arrays, ScanCase, make_arrays, make_cotangent
from top_jax.benchmark.floor import Ceilings, floor_of, scan_work
from top_jax.benchmark.timing import Rounds, Row, Timing, compile_all, over_sets, time_in_turn, told
from top_jax.kernels.blocks import Blocks
from top_jax.ops import ScanArguments, ScanPlan, directional_scan, selective_scan
from top_jax.ops.directions import gaps, one_by_one

Scan = Callable[[Arrays], jax.Array]

PASSES: Final = ("forward", "forward+backward")
ASSOCIATIVE: Final = "associative"
APART: Final = "one call each"  # per direction, by the implementation that `auto` runs; XLA sums and gates
_CACHE_BYTES: Final = 64 * 2**20  # at least the second-level cache of any GPU we know (an H200 has 60 MB)
_MOST_SETS: Final = 6


def scan_of(case: ScanCase, implementation: str, blocks: Blocks | None = None) -> Scan:
    """The case as a function of its arrays, by an implementation of ours, `associative` or `one call each`; y alone."""
    if implementation == APART:
        return functools.partial(_one_call_each, case.options["reverse"])
    if implementation != ASSOCIATIVE:
        options = {**case.options, "implementation": implementation, "blocks": blocks}
        return lambda arrays: directional_scan(**arrays, **options)[0]

    def run(arrays: Arrays) -> jax.Array:
        reverse = case.options["reverse"]
        gap = gaps(arrays["positions"], reverse) if "positions" in arrays else None
        own = {name: arrays[name] for name in ScanArguments._fields if name in arrays}
        plan = ScanPlan(reverse, case.reorder_parameters)
        return one_by_one(associative_scan, plan, ScanArguments(**own, gap=gap), arrays.get("z"))[0]

    return run


def _one_call_each(reverse: tuple[bool, ...], arrays: Arrays) -> jax.Array:
    """What ViM's mixer does, in the dtype of u as there."""
    u, delta, A, B, C, D, bias, z = (arrays[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z"))
    scans = [
        selective_scan(u[g], delta[g], A[g], B[g], C[g], D[g], delta_bias=bias[g], reverse=backwards)
        for g, backwards in enumerate(reverse)
    ]
    return sum(scans[1:], scans[0]) * jax.nn.silu(z)


def with_gradients(scan: Scan) -> Callable[[Arrays, jax.Array], tuple[jax.Array, Arrays]]:
    """(y, gradients by every floating-point array) as a function of the arrays and the cotangent of y."""

    def run(arrays: Arrays, dy: jax.Array) -> tuple[jax.Array, Arrays]:
        floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        y, back = jax.vjp(lambda floats: scan({**arrays, **floats}), floats)
        return y, back(dy)[0]

    return run


def input_sets(case: ScanCase, *, rotate: bool) -> list[tuple[Arrays, jax.Array]]:
    """Arrays and cotangent, so many sets of them that together they are several times the cache."""
    first = (make_arrays(case, 0), make_cotangent(case, 0))
    size = sum(array.nbytes for array in jax.tree.leaves(first))
    count = min(max(2, -(-3 * _CACHE_BYTES // size)), _MOST_SETS) if rotate else 1
    return [first, *((make_arrays(case, seed), make_cotangent(case, seed)) for seed in range(1, count))]


def time_scans(
    case: ScanCase,
    implementations: tuple[str, ...],
    ceilings: Ceilings,
    rounds: Rounds,
    *,
    memory: int | None = None,
    workers: int = 4,
    passes: tuple[str, ...] = PASSES,
) -> list[Row]:
    """A row for each implementation and pass.

    Args:
        case: what is scanned.
        implementations: names of ours, `associative` or `one call each`.
        ceilings: for the floor.
        rounds: of the timing; several calls to a measurement also mean several input sets.
        memory: bytes that may be used; `associative` is not tried where it would need more.
        workers: programs compiled at a time.
        passes: of `PASSES`.

    Returns:
        Rows with `median_ms`, the floor and `times_floor`, or `error`, or `absent` with the reason.
    """
    sets = input_sets(case, rotate=rounds.measurement > 0)
    sizes = (case.directions, case.batch, case.length, case.width, case.states)
    rows: list[Row] = []
    for which in passes:
        gradient = which != PASSES[0]
        start = {"case": case.name, "length": case.length, "dtype": case.dtype, "decay": case.decay, "pass": which}
        floor = floor_of(scan_work(sets[0][0], *sizes, gradient=gradient), ceilings)
        absent = {
            name: reason for name in implementations if (reason := _too_large(name, case, memory, gradient=gradient))
        }
        functions = {
            name: with_gradients(scan_of(case, name)) if gradient else scan_of(case, name)
            for name in implementations
            if name not in absent
        }
        arguments = [pair if gradient else pair[:1] for pair in sets]
        for name, result in time_programs(functions, arguments, rounds, workers).items():
            row = {**start, "implementation": name}
            if isinstance(result, Exception):
                rows.append({**row, "error": told(result)})
                continue
            floor_ms = floor["floor_ms"]
            ratio = {"times_floor": round(result.median * 1e3 / floor_ms, 2)} if floor_ms else {}
            rows.append({**row, **result.row(), **floor, **ratio})
        rows += [{**start, "implementation": name, "absent": reason} for name, reason in absent.items()]
    return rows


def time_programs(
    functions: dict[str, Callable[..., Any]], arguments: list[tuple[Any, ...]], rounds: Rounds, workers: int
) -> dict[str, Timing | Exception]:
    """Compiles functions of the same arguments and times them in turn, over several sets of these."""
    lower = {name: functools.partial(jax.jit(run).lower, *arguments[0]) for name, run in functions.items()}
    compiled = compile_all(lower, workers)
    ready = {
        name: over_sets(found[0], arguments) for name, found in compiled.items() if not isinstance(found, Exception)
    }
    refused = {name: found for name, found in compiled.items() if isinstance(found, Exception)}
    timed = time_in_turn(ready, rounds)
    return {name: refused.get(name) or timed[name] for name in functions}


def _too_large(name: str, case: ScanCase, memory: int | None, *, gradient: bool) -> str | None:
    if name != ASSOCIATIVE or memory is None:
        return None
    states = case.batch * case.length * case.width * case.states * 4
    needed = STATES_KEPT * states * (case.directions if gradient else 1)
    if needed <= memory:
        return None
    return f"it would need about {needed / 2**30:.0f} GiB and {memory / 2**30:.0f} are free"
