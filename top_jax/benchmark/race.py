"""Times contestants in turn at one batch size after the other, within a budget of time and of memory.

At each batch size a round measures every contestant once, one call, waited for: latency is that time, images per second
the batch over it. Compiling and the two calls before the rounds are not counted. The sizes end where the dense model
does not fit, or where the next size would take more time than is left.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import jax
import optax
from flax import nnx

from top_jax.benchmark.contestants import DENSE, Contestant
from top_jax.benchmark.programs import (
    LEARNING_RATE,
    PASSES,
    TrainSteps,
    make_batches,
    make_inference,
    make_train_step,
    memory_row,
    program_bytes,
    random_weights,
)
from top_jax.benchmark.speedup import judged_by, macs_ratios, paired_speedup, verdict
from top_jax.benchmark.timing import Rounds, Row, Timing, compile_all, over_sets, time_in_turn, told
from top_jax.models.weights import split_weights, statistics_of
from top_jax.ops import implementations

WARM_UP: Final = 2  # calls that `time_in_turn` makes before its rounds
MOST_ROUNDS: Final = 100
LEAST_ROUNDS: Final = 5  # fewer have no quartiles to speak of
SHARE_OF_ROUNDS: Final = 0.15  # of the budget: what the rounds of one batch size may take beyond the least
_TRAINING_TIMES_INFERENCE: Final = 5.0  # in compiling: ViM-S 18.2 s of 3.6 s (docs/models.md, section 5)
SHARE_OF_FREE_MEMORY: Final = 0.5  # of a CPU's, which the system would end the process for; a GPU's allocator tells


class Results(NamedTuple):
    """What there is so far.

    Attributes:
        rows: one for each contestant, pass and batch size that was tried; with `error` where it could not be measured.
        skipped: what was not tried, by contestant, pass and batch size, and the reason.
    """

    rows: list[Row]
    skipped: list[Row]


def growing() -> Iterator[int]:
    """1, 8, 32, 64, 128 and so on."""
    return itertools.chain((1, 8), (32 * 2**power for power in itertools.count()))


def out_of_memory(problem: Exception) -> bool:
    """Whether it says that something does not fit, as XLA or we say it."""
    return isinstance(problem, MemoryError) or "RESOURCE_EXHAUSTED" in str(problem)


def memory_limit() -> int | None:
    """Bytes that one program may take here; None is up to the device's allocator."""
    if implementations.device().platform != "cpu":
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not tell, such as macOS
        return None
    return int(free * SHARE_OF_FREE_MEMORY)


class Race:
    """The contestants with their weights, and the results as they come.

    Args:
        field: the contestants, the dense model first.
        seconds: the budget of time.
        memory: bytes that one program may take; None: no limit of ours.
        workers: programs compiled at a time, at least 2.
        tick: called often, to show progress.
    """

    def __init__(
        self,
        field: list[Contestant],
        seconds: float,
        *,
        memory: int | None,
        workers: int,
        tick: Callable[[], None] = lambda: None,
    ):
        self._begun, self._seconds, self._tick = time.perf_counter(), seconds, tick
        self._field, self._memory, self._workers = field, memory, workers
        self._weights = {kind: random_weights(model) for kind, model in {c.weights: c.model for c in field}.items()}
        self.results = Results([], [])

    def run(self, passes: tuple[str, ...], sizes: Callable[[], Iterable[int]], save: Callable[[], None]) -> Results:
        """Runs all passes, each with an equal share of the time that is left; calls `save` after each batch size."""
        pace = _Pace(self._begun, group=0.0)
        for place, which in enumerate(passes):
            now = time.perf_counter()
            left = max(self._begun + self._seconds - now, 0) / (len(passes) - place)
            pace = _Pace(now + left, group=_TRAINING_TIMES_INFERENCE * pace.group)
            running = list(self._field)
            for batch in sizes():
                sets = self._sets(batch)
                if reason := self._obstacle(running, sets, pace, batch):
                    self._skip(running, which, batch, reason, and_larger=True)
                    save()
                    break
                running = self._heat(running, which, batch, sets, pace)
                save()
        return self.results

    def _sets(self, batch: int) -> Any:
        """What `make_batches` gives, or the exception where even that does not fit."""
        try:
            return jax.block_until_ready(make_batches(self._field[0].model.config, batch))
        except Exception as problem:
            if out_of_memory(problem):
                return problem
            raise

    def _obstacle(self, running: list[Contestant], sets: Any, pace: _Pace, batch: int) -> str | None:
        """Why there is no going on, or None. Of the first pass at its first size nothing is known: it runs."""
        if isinstance(sets, Exception):
            return "the images alone do not fit in memory"
        if DENSE not in [c.name for c in running]:
            return "the dense model did not run before"
        return pace.too_long(batch, share=self._workers / len(running)) if pace.group else None

    def _skip(
        self, contestants: list[Contestant], which: str, batch: int, reason: str, *, and_larger: bool = False
    ) -> None:
        self.results.skipped.append(
            {
                "pass": which,
                "batch": batch,
                "and_larger": and_larger,
                "contestants": [c.name for c in contestants],
                "reason": reason,
            }
        )

    def _heat(
        self, running: list[Contestant], which: str, batch: int, sets: list[Any], pace: _Pace
    ) -> list[Contestant]:
        """Measures one batch size; returns who can go on to a larger one."""
        begun = time.perf_counter()
        programs = self._compile(running, which, batch, sets[0], pace)
        compiled = time.perf_counter()
        started = [c for c in running if c.name in programs]
        ready = [c for c in started if not isinstance(programs[c.name], Exception)]
        runs = {c.name: self._run_of(c, programs[c.name][0], which, sets) for c in ready}
        seconds = min(SHARE_OF_ROUNDS * self._seconds, pace.left())
        rounds = Rounds(MOST_ROUNDS, seconds, measurement=0.0, least=LEAST_ROUNDS)
        timed = {**programs, **time_in_turn(runs, rounds, on_round=self._tick)}
        finished = time.perf_counter()
        pace.note_rounds(sum((found.median for found in timed.values() if isinstance(found, Timing)), 0.0), batch)
        rows = [self._row(c, which, batch, programs[c.name], timed) for c in started]
        self.results.rows.extend(rows)
        count = max((row["rounds"] for row in rows if "rounds" in row), default=0)
        print(
            f"{which}, batch {batch}: {len(started)} programs compiled in {compiled - begun:.0f} s, {count} rounds in "
            f"{finished - compiled:.0f} s",
            flush=True,
        )
        for row in rows:
            if "error" in row:
                print(f"  {row['contestant']}: {row['error']}", flush=True)
        failed = {row["contestant"] for row in rows if "error" in row}
        return [c for c in running if c.name not in failed]

    def _compile(
        self, running: list[Contestant], which: str, batch: int, example: tuple[Any, Any], pace: _Pace
    ) -> dict[str, Any]:
        """By name what `compile_all` gives, in groups as long as there is time; the first group runs."""
        found: dict[str, Any] = {}
        for place in range(0, len(running), self._workers):
            group = running[place : place + self._workers]
            if place and (reason := pace.too_long(batch)):
                self._skip(running[place:], which, batch, reason)
                break
            begun = time.perf_counter()
            found |= compile_all({c.name: self._lowering(c, which, example) for c in group}, self._workers)
            pace.note_group(time.perf_counter() - begun)
            self._tick()
        return {name: self._fitting(result) for name, result in found.items()}

    def _lowering(self, contestant: Contestant, which: str, example: tuple[Any, Any]) -> Callable[[], Any]:
        weights = self._weights[contestant.weights]
        if which == PASSES[0]:
            inference = jax.jit(make_inference(nnx.graphdef(contestant.model)))
            return functools.partial(inference.lower, weights, example[0])
        step = jax.jit(make_train_step(contestant.model, _optimizer()), donate_argnums=(0, 1))
        return functools.partial(step.lower, weights, self._state(contestant), *example)

    def _state(self, contestant: Contestant) -> Any:
        params, _ = split_weights(self._weights[contestant.weights], statistics_of(contestant.model))
        return _optimizer().init(params)

    def _fitting(self, compiled: Any) -> Any:
        """The program, or MemoryError where it takes more than it may."""
        if isinstance(compiled, Exception) or self._memory is None:
            return compiled
        planned = program_bytes(compiled[0])
        if planned is None or planned <= self._memory:
            return compiled
        return MemoryError(f"it needs {planned / 2**20:.0f} MiB, and {self._memory / 2**20:.0f} MiB may be used")

    def _run_of(self, contestant: Contestant, program: Any, which: str, sets: list[Any]) -> Callable[[int], Any]:
        weights = self._weights[contestant.weights]
        if which == PASSES[0]:
            return over_sets(program, [(weights, images) for images, _ in sets])
        return TrainSteps(program, weights, self._state(contestant), sets)

    def _row(self, contestant: Contestant, which: str, batch: int, program: Any, timed: dict[str, Any]) -> Row:
        row: Row = {"pass": which, "batch": batch, "contestant": contestant.name}
        result, dense = timed[contestant.name], timed[DENSE]
        if isinstance(result, Exception):
            return {**row, "error": told(result), "out_of_memory": out_of_memory(result)}
        row |= {**result.row(), **result.rates(batch)}
        row["times_ms"] = [round(seconds * 1e3, 4) for seconds in result.each]
        row |= {"compile_s": round(program[1], 1), **memory_row(program[0])}
        row["macs_ratio"] = {
            k: round(v, 4) for k, v in macs_ratios(self._field[0].cost.macs, contestant.cost.macs).items()
        }
        if contestant.name != DENSE and not isinstance(dense, Exception):
            speedup = paired_speedup(dense.each, result.each)
            row["speedup"] = round(speedup.median, 4)
            row["speedup_quartiles"] = [round(speedup.low, 4), round(speedup.high, 4)]
            if contestant.prunes:
                row["verdict"] = verdict(speedup, row["macs_ratio"][judged_by(row["macs_ratio"])])
        return row


class _Pace:
    """How long things take, to tell whether there is time for more.

    Args:
        end: `time.perf_counter()` at which it is over.
        group: seconds that a group of programs may take to compile, as far as is known; 0 if nothing is.
    """

    def __init__(self, end: float, group: float):
        self._end, self.group = end, group
        self._round, self._batch = 0.0, 1

    def note_group(self, seconds: float) -> None:
        """A group of programs took so long to compile."""
        self.group = max(self.group, seconds)

    def note_rounds(self, seconds: float, batch: int) -> None:
        """One round of all contestants took so long."""
        self._round, self._batch = seconds, batch

    def left(self) -> float:
        """Seconds until the end."""
        return max(self._end - time.perf_counter(), 0.0)

    def too_long(self, batch: int, share: float = 1.0) -> str | None:
        """Why not to compile another group and run the least rounds, of this share of the contestants; or None."""
        rounds = (WARM_UP + LEAST_ROUNDS) * self._round * share * batch / self._batch
        needed, left = self.group + rounds, self.left()
        if needed <= left:
            return None
        return f"it would take about {needed:.0f} s, and {left:.0f} s of the budget are left"


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE)
