"""Times the scans of the published models, by every implementation, against the floor and each other.

ViM scans one direction at a time, each with its own u, delta, B and C; XLA computes the sum and the gate. PlainMamba's
four directions share u, which they visit in boustrophedon orders, and delta, B and C, which stay in raster order. Only
the direction vector in B differs (docs/concepts/models.md, section 2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.benchmark.floor import Ceilings, floor_of, scan_work
from top_jax.benchmark.timing import Rounds, Row, Timing, compile_all, one_line, over_sets, time_in_turn
from top_jax.kernels.blocks import Blocks
from top_jax.models import MODELS
from top_jax.models.sizes import MambaConfig
from top_jax.models.traversals import DIRECTIONS, traverse
from top_jax.ops import ScanArguments, ScanPlan, directional_scan, selective_scan
from top_jax.ops.alignment import gaps
from top_jax.ops.directions import one_by_one
from top_jax.ops.xla import scanned_before
from top_jax.pruning import Pruning

Arrays = dict[str, jax.Array]
Output = tuple[jax.Array, jax.Array | None]  # y and the score, or None
Scan = Callable[[Arrays], Output]

GRID: Final = 14  # rows and columns of patches of a 224-pixel image
BATCH: Final = 128
FORWARD: Final = "forward"
WITH_GRADIENTS: Final = "forward+backward"
ASSOCIATIVE: Final = "associative"
APART: Final = "one call each"  # one call per direction by the implementation that `auto` chooses; XLA sums and gates
# Number of [B, L, E, N] arrays that autodiff of `associative` allocates per direction. Measured: 11.7, from 433 MiB at
# B 8, L 197, E 384, N 16 (docs/results/cpu.md).
STATES_KEPT: Final = 12
_CACHE_BYTES: Final = 64 * 2**20  # at least the second-level cache of any GPU we know (an H200 has 60 MB)
_MOST_SETS: Final = 6


@dataclasses.dataclass(frozen=True)
class ScanCase:
    """Sizes and options of one scan.

    Attributes:
        name: the model, or what the case tests.
        length: L.
        width: E.
        states: N.
        directions: 1, 2 as in ViM, or 4 as in PlainMamba, which visits the tokens of a square grid by an order.
        dtype: dtype of u, delta, B, C and z.
        batch: B.
        decay: whether the tokens have gaps through which the state decays, as after pruning.
        gated: whether z gates the sum over directions.
        backwards: whether a single direction scans from the last token to the first.
        reorder_parameters: see `directional_scan`.
        score: see `directional_scan`.
    """

    name: str
    length: int
    width: int
    states: int = 16
    directions: int = 2
    dtype: str = "bfloat16"
    batch: int = BATCH
    decay: bool = False
    gated: bool = True
    backwards: bool = False
    reorder_parameters: bool = False
    score: str | None = None

    @property
    def ordered(self) -> bool:
        """Whether tokens are visited by an order."""
        return self.directions == DIRECTIONS

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `directional_scan` other than the arrays."""
        reverse = (self.backwards,) if self.directions == 1 else (False, True)[: self.directions]
        return {
            "reverse": (False,) * DIRECTIONS if self.ordered else reverse,
            "reorder_parameters": self.reorder_parameters,
            "alignment": "decay" if self.decay else "none",
            "score": self.score,
        }

    def label(self) -> str:
        """Returns the case's name in a table."""
        return f"{self.name} L{self.length} {self.dtype}{' decay' if self.decay else ''}"


class ScannedModel(NamedTuple):
    """A published model: its names in tables and in `top_jax.models.MODELS`, and the schedule that its configs use."""

    label: str
    name: str
    pruning: Pruning

    @property
    def sizes(self) -> MambaConfig:
        """Sizes of the model."""
        sizes = MODELS[self.name]
        assert isinstance(sizes, MambaConfig)
        return sizes

    def lengths(self) -> tuple[int, ...]:
        """Returns L of the dense model, and after each prune."""
        cuts = self.pruning.schedule(self.sizes.num_patches, self.sizes.depth)
        patches = (self.sizes.num_patches, *(cut.after for cut in cuts))
        return tuple(count + (self.sizes.CLASS_TOKEN is not None) for count in patches)

    def scan(self, dtype: str, *, length: int | None = None, decay: bool = False) -> ScanCase:
        """Returns the model's scan, at its dense length unless another is given."""
        one_by_one = self.name.startswith("vim")
        return ScanCase(
            self.label,
            length or self.lengths()[0],
            self.sizes.inner_dim,
            self.sizes.d_state,
            directions=1 if one_by_one else DIRECTIONS,
            dtype=dtype,
            decay=decay,
            gated=not one_by_one,
        )


VIM_SMALL: Final = ScannedModel("ViM-S", "vim_small", Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8))
SCANNED: Final = (
    VIM_SMALL,
    ScannedModel("ViM-T", "vim_tiny", Pruning(after_blocks=(10, 20), keep_ratio=0.85)),
    ScannedModel("ViM-B", "vim_base", Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8)),
    ScannedModel("PlainMamba-L1", "plain_mamba_l1", Pruning(after_blocks=(5, 10, 15), keep_ratio=0.7)),
    ScannedModel("PlainMamba-L3", "plain_mamba_l3", Pruning(after_blocks=(6, 12, 18), keep_ratio=0.7)),
)


def make_arrays(case: ScanCase, seed: int) -> Arrays:
    """Draws arguments of `directional_scan` by name: never 0, with time steps and decays as in a trained model."""
    keys = jax.random.split(jax.random.key(seed), 9)
    directions, tokens = case.directions, (case.batch, case.length, case.width)
    each = 1 if case.ordered else directions
    selective = (case.batch, case.length, case.states)

    def draw(key: jax.Array, *shape: int, dtype: str = case.dtype) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    arrays = {
        "u": draw(keys[0], each, *tokens),
        "delta": draw(keys[1], each, *tokens),
        "A": -jnp.exp(draw(keys[2], each, case.width, case.states, dtype="float32")),
        "B": draw(keys[3], directions, *selective),
        "C": draw(keys[4], each, *selective),
        "D": draw(keys[5], each, case.width, dtype="float32"),
        "delta_bias": draw(keys[6], each, case.width, dtype="float32") - 2,
    }
    if case.gated:
        arrays["z"] = draw(keys[7], *tokens)
    return arrays | _places(case, seed)


def make_cotangent(case: ScanCase, seed: int) -> jax.Array:
    """Draws a cotangent of y, `[B, L, E]`."""
    shape = (case.batch, case.length, case.width)
    return jax.random.normal(jax.random.key(seed + 1000), shape, jnp.float32).astype(case.dtype)


def _places(case: ScanCase, seed: int) -> Arrays:
    """Draws `order` where the case has one, and `positions` where the state decays through gaps."""
    rng = np.random.default_rng(seed)
    if not case.ordered:
        if not case.decay:
            return {}
        steps = rng.integers(1, 4, size=(1, case.batch, case.length))
        return {"positions": jnp.asarray(np.cumsum(steps, axis=-1) - 1, jnp.int32)}
    side = max(GRID, int(np.ceil(np.sqrt(case.length))))
    kept = np.stack([np.sort(rng.choice(side * side, case.length, replace=False)) for _ in range(case.batch)])
    alignment = "decay" if case.decay else "hold"
    paths = traverse(jnp.asarray(kept, jnp.int32), (side, side), alignment, by_token=False)
    return {"order": paths.order} if paths.positions is None else {"order": paths.order, "positions": paths.positions}


def scan_of(case: ScanCase, implementation: str, blocks: Blocks | None = None) -> Scan:
    """Returns the case as a function of its arrays, by one of our implementations, `associative` or `one call each`."""
    if implementation == APART:
        return functools.partial(_one_call_each, case.options["reverse"])
    if implementation == ASSOCIATIVE:
        return functools.partial(_associative, case)
    options = {**case.options, "implementation": implementation, "blocks": blocks}
    return lambda arrays: directional_scan(**arrays, **options)


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
    """Returns a function of arrays and cotangent of y: ((y, score), gradients of all floating-point arrays)."""

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
        implementations: names of implementations of the scan, `associative` or `one call each`.
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
    rows: list[Row] = []
    for which in passes:
        gradient = which == WITH_GRADIENTS
        start = {"case": case.name, "length": case.length, "dtype": case.dtype, "decay": case.decay, "pass": which}
        floor = floor_of(scan_work(sets[0][0], gradient=gradient), ceilings)
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
            ratio = {"times_floor": round(result.spread.median * 1e3 / floor_ms, 2)} if floor_ms else {}
            rows.append({**row, **result.row(), **floor, **ratio})
        rows += [{**start, "implementation": name, "absent": reason} for name, reason in absent.items()]
    return rows


def time_programs(
    scans: Mapping[Any, Scan], sets: list[tuple[Arrays, jax.Array]], rounds: Rounds, workers: int, *, gradient: bool
) -> dict[Any, Timing | Exception]:
    """Compiles scans of the same case, with all gradients or without, and times them in turn.

    Args:
        scans: by a name or another key.
        sets: from `input_sets`.
        rounds: how long to time.
        workers: programs compiled at a time.
        gradient: whether the gradients are computed too.
    """
    arguments = [pair if gradient else pair[:1] for pair in sets]
    functions = {name: with_gradients(scan) if gradient else scan for name, scan in scans.items()}
    lower = {name: functools.partial(jax.jit(run).lower, *arguments[0]) for name, run in functions.items()}
    compiled = compile_all(lower, workers)
    runs = {n: p if isinstance(p, Exception) else over_sets(p.run, arguments) for n, p in compiled.items()}
    return time_in_turn(runs, rounds)


def _too_large(name: str, case: ScanCase, memory: int | None, *, gradient: bool) -> str | None:
    if name != ASSOCIATIVE or memory is None:
        return None
    states = case.batch * case.length * case.width * case.states * 4
    needed = STATES_KEPT * states * (case.directions if gradient else 1)
    if needed <= memory:
        return None
    return f"it would need about {needed / 2**30:.0f} GiB; {memory / 2**30:.0f} GiB are free"
