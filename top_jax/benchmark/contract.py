"""Checks on this device that an implementation computes what `reference` does: values, all gradients, reproducibly.

The contract of the test suite (tests/ops/test_contract.py) is larger. This is the part that has to run on a GPU, where
the kernels are compiled that the tests can only interpret: odd sizes, one token, one channel, sizes that do not fill a
block, every alignment, one and several directions, orders, both dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Final

import jax
import numpy as np

from top_jax.benchmark.scans import ScanCase, make_arrays, make_cotangent, scan_of, with_gradients
from top_jax.benchmark.timing import Program, Row, compile_all, one_line

# Largest error, relative to the largest value of the array compared. float32: sums and exponentials in another order
# and by another unit (a GPU's exp2 is good to 2 ulp). bfloat16: computed in float32 and rounded to 8 bits at the end; a
# last bit that is rounded the other way is up to 2^-7 of the value.
TOLERANCE: Final = {
    "float32": {"value": 1e-5, "gradient": 5e-5},
    "bfloat16": {"value": 2**-7, "gradient": 2**-7},
}

# Small enough for a CPU in interpret mode.
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


def check_contract(implementation: str, cases: tuple[ScanCase, ...], workers: int = 4, runs: int = 2) -> list[Row]:
    """Compares an implementation with `reference` on every case.

    Args:
        implementation: name of an implementation of the scan.
        cases: scans to compare.
        workers: programs compiled at a time.
        runs: runs of each case, which must be bit-equal.

    Returns:
        A row for each case, with the largest relative error of values and of gradients. It has `error` where one is too
        large, where runs differ, or where the implementation does not run.
    """
    inputs = [(make_arrays(case, 0), make_cotangent(case, 0)) for case in cases]
    names = (implementation, "reference")
    lower = {
        (name, number): functools.partial(jax.jit(with_gradients(scan_of(case, name))).lower, *arguments)
        for number, (case, arguments) in enumerate(zip(cases, inputs, strict=True))
        for name in names
    }
    # A CPU spends nearly all of the time compiling, which is several times faster without optimisation.
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    compiled = compile_all(lower, workers, fast)
    rows = []
    for number, (case, arguments) in enumerate(zip(cases, inputs, strict=True)):
        row: Row = {"implementation": implementation, "case": case.label()}
        try:
            ours, reference = (_program(compiled[name, number]) for name in names)
            got, want = ours(*arguments), reference(*arguments)
            again = (ours(*arguments) for _ in range(runs - 1))
            rows.append(row | compare(case.dtype, got, again, want))
        except Exception as error:  # one that does not compile or launch is a result
            rows.append(row | {"error": one_line(error)})
    return rows


def compare(dtype: str, got: Any, again: Iterable[Any], want: Any) -> Row:
    """Compares a run with a reference and with its repetitions; each is a result of `with_gradients`'s function.

    Args:
        dtype: dtype whose tolerance applies.
        got: result of the first run.
        again: results of further runs, which must be bit-equal.
        want: result of the reference.
    """
    (y, score), gradients = got
    (wanted_y, wanted_score), wanted_gradients = want
    values = [relative_error(y, wanted_y)] + ([] if score is None else [relative_error(score, wanted_score)])
    by_name = {name: relative_error(gradients[name], wanted_gradients[name]) for name in wanted_gradients}
    errors = {"value": max(values), "gradient": max(by_name.values())}
    same = all(_bit_equal(got, other) for other in again)
    problems = [
        f"{kind} error {errors[kind]:.1e} is over {limit:.1e}"
        for kind, limit in TOLERANCE[dtype].items()
        if not errors[kind] <= limit
    ]
    if not same:
        problems.append("runs differ")
    row: Row = {f"{kind}_error": error for kind, error in errors.items()}
    row |= {"worst_gradient": max(by_name, key=lambda name: by_name[name]), "bit_equal": same}
    return row | ({"error": "; ".join(problems)} if problems else {})


def _bit_equal(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs)


def relative_error(got: Any, want: Any) -> float:
    """Returns the largest difference over the largest value wanted; infinity where `got` has NaN or infinity."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def _program(compiled: Program | Exception) -> Any:
    if isinstance(compiled, Exception):
        raise compiled
    return compiled.run
