"""Times contestants in turn at growing batch sizes, within a budget of time and of memory.

At each batch size a round measures every contestant once, one call, waited for. Latency is that time, images per second
is the batch over it. Compiling and the two calls before the rounds are not counted. The sizes end when the dense model
no longer fits in memory, or when the next size would take more time than is left.

The speed-up is the median over the rounds of dense time / own time in the same round, with the quartiles of those
ratios: a slow spell of the machine slows both and hardly changes their ratio. A pruned model gets a verdict, the first
of these that holds:

    SLOWER   the upper quartile of the speed-up is below 1
    NO_GAIN  1 lies between the quartiles, so there is no clear difference from the dense model
    LITTLE   even the upper quartile saves less than half of the time that the multiply-accumulates predict:
             (1 - 1 / speed-up) is less than half of (1 - 1 / ratio), with ratio = dense / own multiply-accumulates
    PAYS     otherwise

The ratio is that of the `executed` convention. For a segmenter it is that of the whole model, with the neck and the
heads, whose cost no reduction lowers.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax

from top_jax.benchmark.contestants import DENSE, Contestant
from top_jax.benchmark.programs import Batch, lowering, make_batches, random_weights, run_of, speed_row
from top_jax.benchmark.timing import Program, Rounds, Row, Spread, Timing, compile_all, spread, time_in_turn
from top_jax.memory import out_of_memory, program_memory
from top_jax.ops import implementations

WARM_UP: Final = 2  # calls that `time_in_turn` makes before its rounds
MOST_ROUNDS: Final = 100
LEAST_ROUNDS: Final = 5  # quartiles of fewer mean little
SHARE_OF_ROUNDS: Final = 0.15  # of the budget, for the rounds of one batch size beyond `LEAST_ROUNDS`
_TRAINING_TIMES_INFERENCE: Final = 5.0  # ratio of compile times: 18.2 s and 3.6 s for ViM-S (docs/concepts/models.md)
_SHARE_OF_FREE_MEMORY: Final = 0.5  # on a CPU, where the system would kill the process; a GPU's allocator raises

SLOWER: Final = "slower than dense"
NO_GAIN: Final = "no faster than dense"
LITTLE: Final = "pays little"
PAYS: Final = "pays"
LEAST_SHARE: Final = 0.5  # share of the saving that the multiply-accumulates predict
JUDGED_BY: Final = "executed"  # convention in which these multiply-accumulates are counted


class Race:
    """Contestants with their weights, and the rows measured so far.

    Args:
        field: the contestants, the dense model first.
        seconds: the budget of time.
        memory: bytes that one program may take; None: only the device's limit.
        workers: programs compiled at a time, at least 2.
        tick: called often, to show progress.

    Attributes:
        rows: one for each contestant, pass and batch size that was tried; with `error` where it failed.
        skipped: what was not tried, by contestants, pass and batch size, and the reason.
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
        self.rows: list[Row] = []
        self.skipped: list[Row] = []
        self._started, self._seconds, self._tick = time.perf_counter(), seconds, tick
        self._field, self._memory, self._workers = field, memory, workers
        self._weights = {kind: random_weights(model) for kind, model in {c.weights: c.model for c in field}.items()}

    def run(self, passes: tuple[str, ...], sizes: Callable[[], Iterable[int]], save: Callable[[], None]) -> None:
        """Runs all passes, each with an equal share of the time that is left; calls `save` after each batch size."""
        pace = Pace(self._started, group=0.0)
        for place, which in enumerate(passes):
            now = time.perf_counter()
            left = max(self._started + self._seconds - now, 0) / (len(passes) - place)
            pace = Pace(now + left, group=_TRAINING_TIMES_INFERENCE * pace.group)
            running = list(self._field)
            for batch in sizes():
                sets = self._batches(batch)
                if reason := self._obstacle(running, sets, pace, batch):
                    self._skip(running, which, batch, reason, and_larger=True)
                    save()
                    break
                running = self._measure(running, which, batch, sets, pace)
                save()

    def _batches(self, batch: int) -> Any:
        """Returns the result of `make_batches`, or the exception if the images do not fit in memory."""
        try:
            return jax.block_until_ready(make_batches(self._field[0].model, batch, self._field[0].img_size))
        except Exception as problem:
            if out_of_memory(problem):
                return problem
            raise

    def _obstacle(self, running: list[Contestant], sets: Any, pace: Pace, batch: int) -> str | None:
        """Returns why this batch size is not tried, or None. The first size of the first pass is always tried."""
        if isinstance(sets, Exception):
            return "the images alone do not fit in memory"
        if DENSE not in [c.name for c in running]:
            return "the dense model failed at a smaller batch size"
        return pace.too_long(batch, share=self._workers / len(running)) if pace.group else None

    def _skip(
        self, contestants: list[Contestant], which: str, batch: int, reason: str, *, and_larger: bool = False
    ) -> None:
        names = [c.name for c in contestants]
        self.skipped.append(
            {"pass": which, "batch": batch, "and_larger": and_larger, "contestants": names, "reason": reason}
        )

    def _measure(
        self, running: list[Contestant], which: str, batch: int, sets: list[Batch], pace: Pace
    ) -> list[Contestant]:
        """Measures one batch size; returns the contestants that ran."""
        start = time.perf_counter()
        programs = self._compile(running, which, batch, sets[0], pace)
        compiled = time.perf_counter()
        entrants = [c for c in running if c.name in programs]
        runs = {c.name: run_of(programs[c.name], c.model, which, self._weights[c.weights], sets) for c in entrants}
        seconds = min(SHARE_OF_ROUNDS * self._seconds, pace.left())
        rounds = Rounds(MOST_ROUNDS, seconds, measurement=0.0, least=LEAST_ROUNDS)
        timed = time_in_turn(runs, rounds, self._tick)
        finished = time.perf_counter()
        pace.image = sum(t.spread.median for t in timed.values() if isinstance(t, Timing)) / batch
        rows = [
            {"pass": which, "batch": batch, "contestant": c.name} | self._results(c, programs[c.name], timed, batch)
            for c in entrants
        ]
        self.rows.extend(rows)
        count = max((row["rounds"] for row in rows if "rounds" in row), default=0)
        print(
            f"{which}, batch {batch}: {len(entrants)} programs compiled in {compiled - start:.0f} s, {count} rounds in "
            f"{finished - compiled:.0f} s",
            flush=True,
        )
        for row in rows:
            if "error" in row:
                print(f"  {row['contestant']}: {row['error']}", flush=True)
        failed = {row["contestant"] for row in rows if "error" in row}
        return [c for c in running if c.name not in failed]

    def _compile(
        self, running: list[Contestant], which: str, batch: int, example: Batch, pace: Pace
    ) -> dict[str, Program | Exception]:
        """Compiles programs with `compile_all`, in groups while there is time; the first group is always compiled."""
        found: dict[str, Program | Exception] = {}
        for place in range(0, len(running), self._workers):
            group = running[place : place + self._workers]
            if place and (reason := pace.too_long(batch)):
                self._skip(running[place:], which, batch, reason)
                break
            start = time.perf_counter()
            lower = {c.name: lowering(c.model, which, self._weights[c.weights], example) for c in group}
            found |= compile_all(lower, self._workers)
            pace.group = max(pace.group, time.perf_counter() - start)
            self._tick()
        return {name: self._within_memory(result) for name, result in found.items()}

    def _within_memory(self, compiled: Program | Exception) -> Program | Exception:
        """Returns the program, or a MemoryError if it needs more than the memory limit."""
        if isinstance(compiled, Exception) or self._memory is None:
            return compiled
        planned = program_memory(compiled.run).get("total", 0)
        if planned <= self._memory:
            return compiled
        return MemoryError(f"it needs {planned / 2**20:.1f} MiB; the limit is {self._memory / 2**20:.1f} MiB")

    def _results(
        self, contestant: Contestant, program: Program | Exception, timed: dict[str, Timing | Exception], batch: int
    ) -> Row:
        result, dense = timed[contestant.name], timed[DENSE]
        row = speed_row(program, result, batch)
        if isinstance(result, Exception):
            return {**row, "out_of_memory": out_of_memory(result)}
        row["times_ms"] = [round(seconds * 1e3, 4) for seconds in result.each]
        first, own = self._field[0].cost, contestant.cost
        row["macs_ratio"] = macs_ratios(first.macs, own.macs)
        if own.heads is not None:
            row["backbone_macs_ratio"] = macs_ratios(first.backbone_macs, own.backbone_macs)
        if contestant.name != DENSE and not isinstance(dense, Exception):
            speedup = paired_speedup(dense.each, result.each)
            row["speedup"] = round(speedup.median, 4)
            row["speedup_quartiles"] = [round(speedup.low, 4), round(speedup.high, 4)]
            if contestant.prunes:
                row["verdict"] = verdict(speedup, row["macs_ratio"][JUDGED_BY])
        return row


@dataclasses.dataclass
class Pace:
    """Durations so far, which predict whether there is time for more.

    Attributes:
        end: `time.perf_counter()` at which the time is over.
        group: seconds that compiling a group of programs took at most, or may take; 0 if unknown.
        image: seconds per image of the last round, of all contestants together.
    """

    end: float
    group: float
    image: float = 0.0

    def left(self) -> float:
        """Returns the seconds until the end."""
        return max(self.end - time.perf_counter(), 0.0)

    def too_long(self, batch: int, share: float = 1.0) -> str | None:
        """Returns why the time left is too short to compile another group and time this share of all, or None."""
        rounds = (WARM_UP + LEAST_ROUNDS) * self.image * share * batch
        needed, left = self.group + rounds, self.left()
        if needed <= left:
            return None
        return f"it would take about {needed:.0f} s, and {left:.0f} s of the budget are left"


def growing() -> Iterator[int]:
    """Yields the batch sizes 1, 8, 32, 64, 128 and so on."""
    return itertools.chain((1, 8), (32 * 2**power for power in itertools.count()))


def memory_limit() -> int | None:
    """Returns the bytes that one program may take on a CPU; None leaves it to the device's allocator."""
    if implementations.device().platform != "cpu":
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # systems without these values, such as macOS
        return None
    return int(free * _SHARE_OF_FREE_MEMORY)


def paired_speedup(dense: Sequence[float], own: Sequence[float]) -> Spread:
    """Returns dense time / own time over the rounds.

    Args:
        dense: seconds of the dense model in each round.
        own: seconds of the other model in the same rounds.
    """
    return spread([d / o for d, o in zip(dense, own, strict=True)])


def macs_ratios(dense: Mapping[str, int], own: Mapping[str, int]) -> dict[str, float]:
    """Returns dense / own multiply-accumulates by convention, to four decimals."""
    return {convention: round(dense[convention] / own[convention], 4) for convention in own}


def verdict(speedup: Spread, macs_ratio: float) -> str:
    """Returns `SLOWER`, `NO_GAIN`, `LITTLE` or `PAYS` for a pruned model; `macs_ratio` is dense / own."""
    if speedup.high < 1:
        return SLOWER
    if speedup.low <= 1:
        return NO_GAIN
    saved, predicted = 1 - 1 / speedup.high, 1 - 1 / macs_ratio
    return LITTLE if saved < LEAST_SHARE * predicted else PAYS
