"""Compiles several functions and times them in turn, in one process, so that a slow spell of the machine hits all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import jax
import numpy as np

Run = Callable[[int], Any]  # called with 0, 1, 2, ...: the input set to use; returns what to wait for
Row = dict[str, Any]

_DISPATCHES: Final = 200
_MOST_CALLS: Final = 1000  # in one measurement


class Rounds(NamedTuple):
    """How long a group of functions is timed.

    Attributes:
        most: rounds that count; in each, every function is measured once.
        seconds: no round starts after this time, but `least` are always counted.
        measurement: seconds that one measurement should last. Enough calls are queued before the clock is read to hide
            the cost of dispatch. 0 is one call.
        least: rounds that are counted even if they exceed `seconds`.
        settle: whether each measurement follows a call of the same function that is not timed. On a CPU the first call
            pays for what another function left in the caches and the heap.
    """

    most: int
    seconds: float
    measurement: float
    least: int = 1
    settle: bool = False


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and quartiles of at least one value."""
    low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return Spread(median, low, high)


class Timing(NamedTuple):
    """Measured times of a function.

    Attributes:
        each: seconds per call in each round. Functions timed together were called one after the other in each round.
        calls: number of calls that each round's time is the mean of.
    """

    each: tuple[float, ...]
    calls: int = 1

    @property
    def spread(self) -> Spread:
        """Seconds per call over the rounds."""
        return spread(self.each)

    def row(self) -> Row:
        """Returns the times in milliseconds, for a report."""
        median, low, high = (round(seconds * 1e3, 4) for seconds in self.spread)
        return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(self.each), "calls": self.calls}

    def rates(self, images: int) -> Row:
        """Returns images per second, for a report, where each call takes `images` of them."""
        median, low, high = (round(images / seconds, 2) for seconds in self.spread)
        return {"images_per_s": median, "images_per_s_quartiles": [high, low]}


class Program(NamedTuple):
    """A compiled program, and the seconds that tracing and compiling it took."""

    run: Any
    seconds: float


def time_in_turn(
    runs: Mapping[Any, Run | Exception], rounds: Rounds, on_round: Callable[[], None] = lambda: None
) -> dict[Any, Timing | Exception]:
    """Times all functions in turn, round after round, after a warm-up call and a call that sizes a measurement.

    A device runs calls in the order in which they are queued, so waiting for the last waits for all.

    Args:
        runs: functions by name; an exception instead of a function is passed on to the result.
        rounds: how long to time.
        on_round: called after each round.

    Returns:
        Each function's timing, or the exception that it raised; after an exception it was not called again.
    """
    results: dict[Any, Timing | Exception] = {}
    ready: dict[Any, tuple[Run, int]] = {}
    for name, run in runs.items():
        if isinstance(run, Exception):
            results[name] = run
            continue
        try:
            jax.block_until_ready(run(0))
            ready[name] = run, int(min(max(rounds.measurement / _seconds(run, 1), 1), _MOST_CALLS))
        except Exception as error:  # a kernel that cannot be launched is a result; the others are still timed
            results[name] = error
    times: dict[Any, list[float]] = {name: [] for name in ready}
    started, counted = time.perf_counter(), 0
    while times and (
        counted < rounds.least or (counted < rounds.most and time.perf_counter() - started < rounds.seconds)
    ):
        for name in list(times):
            run, calls = ready[name]
            try:
                if rounds.settle:
                    jax.block_until_ready(run(0))
                times[name].append(_seconds(run, calls) / calls)
            except Exception as error:
                results[name] = error
                del times[name]
        counted += 1
        on_round()
    results |= {name: Timing(tuple(seconds), ready[name][1]) for name, seconds in times.items()}
    return {name: results[name] for name in runs}


def over_sets(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Run:
    """Returns a run that takes its arguments from each set in turn, so that no call finds its inputs in the cache."""
    return lambda number: function(*sets[number % len(sets)])


def compile_all(
    lower: Mapping[Any, Callable[[], Any]], workers: int, options: dict[str, Any] | None = None
) -> dict[Any, Program | Exception]:
    """Traces one function after the other and compiles several at a time.

    Args:
        lower: functions by name that return a `jax.stages.Lowered`.
        workers: programs compiled at a time.
        options: compiler options.

    Returns:
        The program for each name, or the exception that tracing or compiling raised.
    """

    def finish(lowered: Any, tracing: float) -> Program:
        start = time.perf_counter()
        return Program(lowered.compile(compiler_options=options), tracing + time.perf_counter() - start)

    found: dict[Any, Any] = dict.fromkeys(lower)
    with ThreadPoolExecutor(workers) as pool:
        for name, trace in lower.items():
            start = time.perf_counter()
            try:
                found[name] = pool.submit(finish, trace(), time.perf_counter() - start)
            except Exception as error:  # a program that cannot be traced or compiled is a result
                found[name] = error
    return {name: one if isinstance(one, Exception) else one.exception() or one.result() for name, one in found.items()}


def dispatch_seconds() -> float:
    """Returns the host's seconds per call of a nearly empty program, with many calls queued."""
    run = over_sets(jax.jit(lambda x: x + 1), [(jax.random.normal(jax.random.key(0), (8,)),)])
    jax.block_until_ready(run(0))
    return float(np.median([_seconds(run, _DISPATCHES) / _DISPATCHES for _ in range(5)]))


def one_line(error: Exception) -> str:
    """Returns an exception as one line of limited length, because XLA's and Triton's messages fill pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"


def _seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    last = None
    for number in range(calls):
        last = run(number)
    jax.block_until_ready(last)
    return time.perf_counter() - start
