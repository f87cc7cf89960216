"""Whether an implementation computes what `reference` does on this very device: values, every gradient, twice the same.

The contract of the test suite (tests/ops/test_contract.py) is larger; this is what has to be seen on a GPU, where the
kernels that the tests can only interpret are really compiled: odd sizes, one token, one channel, sizes that fill no
block, every alignment, both directions and several, orders, both dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.benchmark.cases import Arrays, ScanCase, make_arrays, make_cotangent
from top_jax.benchmark.timing import Row, compile_all, told
from top_jax.ops import directional_scan

# Largest error, relative to the largest value of the array compared. float32: sums and exponentials in another order
# and by another unit (a GPU's exp2 is good to 2 ulp). bfloat16: computed in float32 and rounded to 8 bits at the end; a
# last bit that falls the other way is up to 2^-7 of the value.
TOLERANCE: Final = {
    "float32": {"value": 1e-5, "gradient": 5e-5},
    "bfloat16": {"value": 2**-7, "gradient": 2**-7},
}

# The smallest case is also what a CPU has time for in interpret mode.
TINY: Final = (
    ScanCase("one token", 1, 5, 3, directions=1, dtype="float32", batch=2, decay=True, gated=False),
    ScanCase("odd sizes", 9, 5, 3, directions=1, dtype="float32", batch=2, decay=True, backwards=True),
    ScanCase("both directions", 9, 5, 3, dtype="float32", batch=2, decay=True, score="clip"),
    ScanCase("four orders", 9, 5, 3, directions=4, dtype="float32", batch=2, decay=True, score="l2"),
    ScanCase("bfloat16", 9, 5, 16, dtype="bfloat16", batch=2),
)
FULL: Final = (
    *TINY,
    ScanCase("one channel, one state", 17, 1, 1, directions=1, dtype="float32", batch=3),
    ScanCase("no whole block", 65, 200, 16, directions=1, dtype="float32", batch=3, decay=True, gated=False),
    ScanCase("backwards", 64, 96, 16, directions=1, dtype="float32", batch=3, backwards=True),
    ScanCase("ViM image", 197, 384, dtype="float32", batch=2, score="clip"),
    ScanCase("ViM image, pruned", 127, 384, dtype="float32", batch=2, decay=True, score="noclip"),
    ScanCase("ViM image", 197, 768, dtype="bfloat16", batch=2, score="clip"),
    ScanCase("PlainMamba image", 196, 384, directions=4, dtype="float32", batch=2, score="l1"),
    ScanCase("PlainMamba image, reordered", 68, 896, directions=4, dtype="bfloat16", batch=2, decay=True,
             reorder_parameters=True),
)  # fmt: skip


def check_contract(implementation: str, cases: tuple[ScanCase, ...], workers: int = 4) -> list[Row]:
    """A row for each case: largest relative error of values and gradients, and `error` where one is too large."""
    inputs = [(make_arrays(case, 0), make_cotangent(case, 0)) for case in cases]
    names = (implementation, "reference")
    lower = {
        (name, number): functools.partial(jax.jit(everything(case, name)).lower, *arguments)
        for number, (case, arguments) in enumerate(zip(cases, inputs, strict=True))
        for name in names
    }
    # Unoptimised machine code of a CPU is made several times faster, and here compiling is all the work.
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    compiled = compile_all(lower, workers, fast)
    rows = []
    for number, (case, arguments) in enumerate(zip(cases, inputs, strict=True)):
        row: Row = {"implementation": implementation, "case": case.label()}
        try:
            rows.append(row | _compare(case, arguments, *(compiled[name, number] for name in names)))
        except Exception as error:  # does not compile or launch: so says its row
            rows.append(row | {"error": told(error)})
    return rows


def everything(case: ScanCase, implementation: str) -> Callable[[Arrays, jax.Array], tuple[dict[str, Any], Arrays]]:
    """({y, score}, gradients by every floating-point array) as a function of the arrays and the cotangent of y."""

    def run(arrays: Arrays, dy: jax.Array) -> tuple[dict[str, Any], Arrays]:
        floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        scan = functools.partial(directional_scan, **case.options, implementation=implementation)
        y, back, score = jax.vjp(lambda floats: scan(**{**arrays, **floats}), floats, has_aux=True)
        return {"y": y} | ({} if score is None else {"score": score}), back(dy)[0]

    return run


def relative_error(got: Any, want: Any) -> float:
    """Largest difference over the largest value wanted; infinite where `got` has a value that is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def _compare(case: ScanCase, arguments: tuple[Any, ...], ours: Any, reference: Any) -> Row:
    for program in (ours, reference):
        if isinstance(program, Exception):
            raise program
    (got, again), want = (ours[0](*arguments) for _ in range(2)), reference[0](*arguments)
    by_name = [
        {name: relative_error(mine[name], theirs[name]) for name in theirs}
        for mine, theirs in zip(got, want, strict=True)
    ]
    errors = {"value": max(by_name[0].values()), "gradient": max(by_name[1].values())}
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True)
    )
    problems = [
        f"{kind} error {errors[kind]:.1e} is over {limit:.1e}"
        for kind, limit in TOLERANCE[case.dtype].items()
        if not errors[kind] <= limit
    ]
    if not same:
        problems.append("two runs differ")
    row: Row = {f"{kind}_error": error for kind, error in errors.items()}
    row |= {"worst_gradient": max(by_name[1], key=lambda name: by_name[1][name]), "twice_equal": same}
    return row | ({"error": "; ".join(problems)} if problems else {})
