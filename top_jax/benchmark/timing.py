"""Times several functions in turn, in one process: a slow spell of the machine then hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import jax
import numpy as np

Run = Callable[[int], Any]  # called with 0, 1, 2, ...: which of its input sets to use; returns what to wait for
Row = dict[str, Any]

_DISPATCHES: Final = 200


class Rounds(NamedTuple):
    """How long a group of functions is timed.

    Attributes:
        most: rounds that count; in each, every function is measured once.
        seconds: no new round is begun after them, but `least` are always counted.
        measurement: seconds that one measurement should last: so many calls are queued before the clock is read that
            the cost of a dispatch is hidden behind the work. 0 is one call.
        least: rounds that count whatever they take.
    """

    most: int
    seconds: float
    measurement: float
    least: int = 1


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return Spread(median, low, high)


class Timing(NamedTuple):
    """Seconds per call: median and quartiles over the rounds, each of `calls` calls, and what each round gave.

    Functions timed together have as many rounds: those of the same place in `each` were measured one after the other.
    """

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    each: tuple[float, ...] = ()

    def row(self) -> Row:
        """In milliseconds, for a report."""
        median, low, high = (round(seconds * 1e3, 4) for seconds in self[:3])
        return {"median_ms": median, "quartiles_ms": [low, high], "rounds": self.rounds, "calls": self.calls}

    def rates(self, images: int) -> Row:
        """Images per second where a call takes so many of them, for a report."""
        quartiles = [round(images / self.high, 2), round(images / self.low, 2)]
        return {"images_per_s": round(images / self.median, 2), "images_per_s_quartiles": quartiles}


def time_in_turn(
    runs: dict[str, Run], rounds: Rounds, on_round: Callable[[], None] = lambda: None
) -> dict[str, Timing | Exception]:
    """Times all functions in turn, round after round, after one call that warms up and one that sizes a measurement.

    On one device calls run in the order in which they are queued, so that waiting for the last waits for all.

    Args:
        runs: functions by name.
        rounds: how often.
        on_round: called after each round.

    Returns:
        For each name its timing, or what it raised, after which it was left out.
    """
    results: dict[str, Timing | Exception] = {}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run(0))
            single = _seconds(run, 1)
            calls[name] = int(min(max(rounds.measurement / single, 1), 1000))
        except Exception as error:  # a kernel that cannot be launched is a result, and others are still to be timed
            results[name] = error
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun, counted = time.perf_counter(), 0
    while times and (
        counted < rounds.least or (counted < rounds.most and time.perf_counter() - begun < rounds.seconds)
    ):
        for name in list(times):
            try:
                times[name].append(_seconds(runs[name], calls[name]) / calls[name])
            except Exception as error:
                results[name] = error
                del times[name]
        counted += 1
        on_round()
    for name, seconds in times.items():
        results[name] = Timing(*spread(seconds), counted, calls[name], tuple(seconds))
    return {name: results[name] for name in runs}


def over_sets(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Run:
    """A run that takes its arguments from one set after the other, so that no call finds its own in the cache."""
    return lambda number: function(*sets[number % len(sets)])


def compile_all(
    lower: dict[Any, Callable[[], Any]], workers: int, options: dict[str, Any] | None = None
) -> dict[Any, tuple[Any, float] | Exception]:
    """Traces one after the other and compiles side by side.

    Args:
        lower: name -> function that returns a `jax.stages.Lowered`.
        workers: programs compiled at a time.
        options: of the compiler.

    Returns:
        For each name (the compiled program, seconds it took to trace and compile), or what was raised.
    """

    def guarded(function: Callable[[], Any]) -> tuple[Any, float] | Exception:
        start = time.perf_counter()
        try:
            return function(), time.perf_counter() - start
        except Exception as error:  # of the compiler too: a program it refuses is a result
            return error

    def finish(lowered: tuple[Any, float] | Exception) -> tuple[Any, float] | Exception:
        if isinstance(lowered, Exception):
            return lowered
        compiled = guarded(lambda: lowered[0].compile(compiler_options=options))
        return compiled if isinstance(compiled, Exception) else (compiled[0], lowered[1] + compiled[1])

    with ThreadPoolExecutor(workers) as pool:
        waiting = {name: pool.submit(finish, guarded(function)) for name, function in lower.items()}
        return {name: future.result() for name, future in waiting.items()}


def dispatch_seconds() -> float:
    """Host seconds per call of a program that does next to nothing, many being queued."""
    run = over_sets(jax.jit(lambda x: x + 1), [(jax.random.normal(jax.random.key(0), (8,)),)])
    jax.block_until_ready(run(0))
    return float(np.median([_seconds(run, _DISPATCHES) / _DISPATCHES for _ in range(5)]))


def told(error: Exception) -> str:
    """An exception as one line: XLA's and Triton's run over pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"


def _seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    last = None
    for number in range(calls):
        last = run(number)
    jax.block_until_ready(last)
    return time.perf_counter() - start
