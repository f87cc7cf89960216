"""Times the scan's implementations on one case, forward and with all gradients, against the floor and each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from top_jax.benchmark.cases import Arrays, ScanCase, make_arrays, make_cotangent
from top_jax.benchmark.floor import Ceilings, floor_of, scan_work
from top_jax.benchmark.timing import Rounds, Row, Timing, compile_all, one_line, over_sets, time_in_turn
from top_jax.kernels.blocks import Blocks
from top_jax.ops import ScanArguments, ScanPlan, directional_scan, selective_scan
from top_jax.ops.directions import one_by_one
from top_jax.ops.selective_scan import gaps
from top_jax.ops.xla import scanned_before

Output = tuple[jax.Array, jax.Array | None]  # y and the score, or None
Scan = Callable[[Arrays], Output]

FORWARD: Final = "forward"
WITH_GRADIENTS: Final = "forward+backward"
ASSOCIATIVE: Final = "associative"
APART: Final = "one call each"  # one call per direction by the implementation that `auto` chooses; XLA sums and gates
# Arrays of [B, L, E, N] that autodiff of `associative` allocates per direction: 433 MiB at B 8, L 197, E 384, N 16
# (docs/results/cpu.md) is 11.7.
STATES_KEPT: Final = 12
_CACHE_BYTES: Final = 64 * 2**20  # at least the second-level cache of any GPU we know (an H200 has 60 MB)
_MOST_SETS: Final = 6


def scan_of(case: ScanCase, implementation: str, blocks: Blocks | None = None) -> Scan:
    """Returns the case as a function of its arrays, by one of our implementations, `associative` or `one call each`."""
    if implementation == APART:
        return functools.partial(_one_call_each, case.options["reverse"])
    if implementation == ASSOCIATIVE:
        return functools.partial(_associative, case)
    return functools.partial(_by_name, {**case.options, "implementation": implementation, "blocks": blocks})


def _by_name(options: dict[str, Any], arrays: Arrays) -> Output:
    """Calls `directional_scan` on arrays by name."""
    return directional_scan(**arrays, **options)


def _associative(case: ScanCase, arrays: Arrays) -> Output:
    reverse = case.options["reverse"]
    gap = gaps(arrays["positions"], reverse) if "positions" in arrays else None
    own = {name: arrays[name] for name in ScanArguments._fields if name in arrays}
    plan = ScanPlan(reverse, case.reorder_parameters)
    return one_by_one(associative_scan, plan, ScanArguments(**own, gap=gap), arrays.get("z"))


def associative_scan(one: ScanArguments, reverse: bool) -> jax.Array:
    """Scans one direction by `lax.associative_scan` with gradients by autodiff, as JAX suggests. For comparison only.

    Arguments and result are those of `selective_scan_reference`, float32 and with all but `gap` present.
    """
    assert one.D is not None and one.delta_bias is not None
    dt = jax.nn.softplus(one.delta + one.delta_bias[None, None, :])
    tau = dt if one.gap is None else dt + one.gap[:, :, None] * scanned_before(dt, reverse)
    decay = jnp.exp(tau[..., None] * one.A[None, None])  # [B, L, E, N]
    drive = (dt * one.u)[..., None] * one.B[:, :, None, :]
    merge = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])  # noqa: E731
    states = jax.lax.associative_scan(merge, (decay, drive), axis=1, reverse=reverse)[1]
    return jnp.sum(states * one.C[:, :, None, :], axis=-1) + one.D[None, None, :] * one.u


def _one_call_each(reverse: tuple[bool, ...], arrays: Arrays) -> Output:
    """Scans as ViM's mixer does, in the dtype of u."""
    u, delta, A, B, C, D, bias, z = (arrays[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z"))
    scans = [
        selective_scan(u[g], delta[g], A[g], B[g], C[g], D[g], delta_bias=bias[g], reverse=backwards)
        for g, backwards in enumerate(reverse)
    ]
    return sum(scans[1:], scans[0]) * jax.nn.silu(z), None


def with_gradients(scan: Scan) -> Callable[[Arrays, jax.Array], tuple[Output, Arrays]]:
    """Returns a function of arrays and cotangent of y: ((y, score), gradients by every floating-point array)."""

    def run(arrays: Arrays, dy: jax.Array) -> tuple[Output, Arrays]:
        floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        y, back, score = jax.vjp(lambda floats: scan({**arrays, **floats}), floats, has_aux=True)
        return (y, score), back(dy)[0]

    return run


def input_sets(case: ScanCase, *, rotate: bool) -> list[tuple[Arrays, jax.Array]]:
    """Returns pairs of arrays and cotangent; with `rotate`, enough of them to exceed the cache several times."""
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
    passes: tuple[str, ...] = (FORWARD, WITH_GRADIENTS),
) -> list[Row]:
    """Times every implementation in every pass.

    Args:
        case: what is scanned.
        implementations: names of ours, `associative` or `one call each`.
        ceilings: for the floor.
        rounds: how long to time; if a measurement has several calls, these rotate through several input sets.
        memory: bytes that may be used; `associative` is not tried where it would need more.
        workers: programs compiled at a time.
        passes: `FORWARD`, `WITH_GRADIENTS` or both.

    Returns:
        A row for each implementation and pass, with `median_ms`, the floor and `times_floor`, or with `error`, or with
        `absent` and the reason.
    """
    sets = input_sets(case, rotate=rounds.measurement > 0)
    sizes = (case.directions, case.batch, case.length, case.width, case.states)
    rows: list[Row] = []
    for which in passes:
        gradient = which == WITH_GRADIENTS
        start = {"case": case.name, "length": case.length, "dtype": case.dtype, "decay": case.decay, "pass": which}
        floor = floor_of(scan_work(sets[0][0], *sizes, gradient=gradient), ceilings)
        absent = {
            name: reason for name in implementations if (reason := _too_large(name, case, memory, gradient=gradient))
        }
        scans = {name: scan_of(case, name) for name in implementations if name not in absent}
        for name, result in time_programs(scans, sets, rounds, workers, gradient=gradient).items():
            row = {**start, "implementation": name}
            if isinstance(result, Exception):
                rows.append({**row, "error": one_line(result)})
                continue
            floor_ms = floor["floor_ms"]
            ratio = {"times_floor": round(result.median * 1e3 / floor_ms, 2)} if floor_ms else {}
            rows.append({**row, **result.row(), **floor, **ratio})
        rows += [{**start, "implementation": name, "absent": reason} for name, reason in absent.items()]
    return rows


def time_programs(
    scans: dict[str, Scan], sets: list[tuple[Arrays, jax.Array]], rounds: Rounds, workers: int, *, gradient: bool
) -> dict[str, Timing | Exception]:
    """Compiles scans of the same case, with all gradients or without, and times them in turn.

    Args:
        scans: by name.
        sets: from `input_sets`.
        rounds: how long to time. workers: programs compiled at a time.
        gradient: whether the gradients are computed too.
    """
    arguments = [pair if gradient else pair[:1] for pair in sets]
    functions = {name: with_gradients(scan) if gradient else scan for name, scan in scans.items()}
    lower = {name: functools.partial(jax.jit(run).lower, *arguments[0]) for name, run in functions.items()}
    compiled = compile_all(lower, workers)
    refused = {name: found for name, found in compiled.items() if isinstance(found, Exception)}
    ready = {
        name: over_sets(found[0], arguments) for name, found in compiled.items() if not isinstance(found, Exception)
    }
    timed = time_in_turn(ready, rounds)
    return {name: refused.get(name) or timed[name] for name in functions}


def _too_large(name: str, case: ScanCase, memory: int | None, *, gradient: bool) -> str | None:
    if name != ASSOCIATIVE or memory is None:
        return None
    states = case.batch * case.length * case.width * case.states * 4
    needed = STATES_KEPT * states * (case.directions if gradient else 1)
    if needed <= memory:
        return None
    return f"it would need about {needed / 2**30:.0f} GiB; {memory / 2**30:.0f} GiB are free"
