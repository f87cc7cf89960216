"""The floor of a scan: the least time it can take on a device, from its memory traffic and its exponentials.

    bytes          every array read once and every result written once, over the bandwidth of a copy measured here
    exponentials   exp(delta_t A) for every direction, image, token, channel and state, once in each pass, over the
                   rate of the special-function units: 16 per clock in each multiprocessor, compute capability 7.0 on

The larger of the two is the floor. The backward pass needs every decay again, and reading one takes longer than
computing it, so both passes together are counted with twice the exponentials. What an implementation adds (saved
states, partial sums, float32 copies, softplus) is not counted. The floor assumes that a scan reaches the bandwidth of
the copy and that the multiprocessors run at the highest clock that the driver reports; at a lower clock the floor is
higher.

Source of the rate: CUDA C++ Programming Guide, throughput of native arithmetic instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.benchmark.timing import Rounds, Row, Timing, dispatch_seconds, one_line, over_sets, time_in_turn

EXPONENTIALS_PER_CLOCK: Final = 16  # per multiprocessor
COPY_BYTES: Final = 2**30  # per array: far beyond any cache


class Ceilings(NamedTuple):
    """Highest rates of a device; None is unknown.

    Attributes:
        bandwidth: bytes per second, read plus written, of the fastest large copy.
        multiprocessors: number of multiprocessors.
        clock: clock of the multiprocessors in Hz.
        clock_source: where the clock was read, or why it is unknown.
    """

    bandwidth: float | None = None
    multiprocessors: int | None = None
    clock: float | None = None
    clock_source: str = "not measured"

    @property
    def exponentials(self) -> float | None:
        """Exponentials per second."""
        if self.multiprocessors is None or self.clock is None:
            return None
        return self.multiprocessors * self.clock * EXPONENTIALS_PER_CLOCK

    def row(self) -> Row:
        """Returns the rates and the time of a dispatch, measured now, for a report; an `error` if no floor is known."""
        dispatch = {"dispatch_us": round(dispatch_seconds() * 1e6, 1)}
        row = {**self._asdict(), "exponentials": self.exponentials, **dispatch}
        if self.exponentials is None:
            row["error"] = f"no floor without multiprocessors and clock ({self.clock_source})"
        return row


class Work(NamedTuple):
    """Least work of an operation: bytes to and from memory, and exponentials."""

    bytes: int
    exponentials: int


def scan_work(arrays: Mapping[str, Any], *, gradient: bool) -> Work:
    """Counts the least work of `directional_scan`.

    The forward pass reads every argument and writes y. The backward pass reads every argument and the cotangent of y,
    and writes a gradient of every floating-point argument in its own shape and dtype.

    Args:
        arrays: arrays or `jax.ShapeDtypeStruct`s by argument name: u `[.., B, L, E]`, B `[G, B, L, N]` and the others.
        gradient: count forward and backward together.
    """
    size = {name: array.size * jnp.dtype(array.dtype).itemsize for name, array in arrays.items()}
    read, (directions, batch, length, states), width = sum(size.values()), arrays["B"].shape, arrays["u"].shape[-1]
    out = batch * length * width * jnp.dtype(arrays["u"].dtype).itemsize
    exponentials = directions * batch * length * width * states
    if not gradient:
        return Work(read + out, exponentials)
    gradients = sum(size[name] for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating))
    return Work(read + out + read + out + gradients, 2 * exponentials)


def floor_of(work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Returns the floor in ms and which of the two times it is; `floor_ms` is None where a ceiling is unknown."""
    if ceilings.bandwidth is None or ceilings.exponentials is None:
        return {"floor_ms": None, "floor_is": None}
    times = {
        "bytes": work.bytes / ceilings.bandwidth * 1e3,
        "exponentials": work.exponentials / ceilings.exponentials * 1e3,
    }
    larger = max(times, key=lambda name: times[name])
    rounded = {f"{name}_ms": round(ms, 4) for name, ms in times.items()}
    return {"floor_ms": rounded[f"{larger}_ms"], "floor_is": larger, **rounded}


def measure_ceilings(device: Any, card: dict[str, str], rounds: Rounds, copy_bytes: int = COPY_BYTES) -> Ceilings:
    """Measures a GPU's copy bandwidth and reads its other ceilings. On other devices all are unknown.

    Args:
        device: a `jax.Device`.
        card: what `top_jax.environment.nvidia_smi` returned.
        rounds: how long to time the copies.
        copy_bytes: size of the array that is copied.
    """
    if device.platform != "gpu":
        return Ceilings(clock_source="no GPU")
    clock = card.get("clocks.max.sm", "")
    known = clock.replace(".", "", 1).isdigit()
    return Ceilings(
        copy_bandwidth(copy_bytes, rounds),
        getattr(device, "core_count", None),
        float(clock) * 1e6 if known else None,
        f"nvidia-smi clocks.max.sm, {clock} MHz" if known else f"unknown: {card.get('problem', 'not reported')}",
    )


def copy_bandwidth(size: int, rounds: Rounds) -> float:
    """Measures bytes per second, read plus written, by the faster of a copy and a negation of `size` bytes.

    Raises:
        RuntimeError: both failed.
    """
    words = size // 4
    sets = [(jax.random.normal(jax.random.key(seed), (words,), jnp.float32),) for seed in (0, 1)]
    functions = {"copy": jax.jit(jnp.copy), "negate": jax.jit(jnp.negative)}
    results = time_in_turn({name: over_sets(function, sets) for name, function in functions.items()}, rounds)
    times = [timing.spread.median for timing in results.values() if isinstance(timing, Timing)]
    if not times:
        problems = "; ".join(one_line(result) for result in results.values() if isinstance(result, Exception))
        raise RuntimeError(f"no copy of {size} bytes ran ({problems})")
    return 2 * 4 * words / min(times)
