"""Several directions at once are the same scans one by one: values, every gradient, and the score of the gated sum."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error

from top_jax.errors import InputError
from top_jax.kernels.blocks import Blocks
from top_jax.ops import directional_scan, selective_scan
from top_jax.ops.directions import token_score

ALL = ["reference", "xla", "pallas_interpret", pytest.param("triton_interpreter", marks=pytest.mark.triton)]
ALL += [pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "triton")]
BATCH, LENGTH, WIDTH, STATES = 2, 11, 5, 3
TOLERANCE = 2e-5  # as of float32 gradients in test_contract.py
FAST = {"xla_backend_optimization_level": 0}


def draw(*shape: int) -> Any:
    """float32, of NumPy: JAX would compile a program for each operation on it."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def inputs(directions: int, shared: int) -> dict[str, Any]:
    """`shared` is the first axis of u, delta, A, C and D: 1, as PlainMamba's, or `directions`, as ViM's."""
    tokens = (BATCH, LENGTH, WIDTH)
    arrays = {
        "u": draw(shared, *tokens),
        "delta": draw(shared, *tokens) + np.float32(0.5),
        "A": -np.exp(draw(shared, WIDTH, STATES)),
        "B": draw(directions, BATCH, LENGTH, STATES),
        "C": draw(shared, BATCH, LENGTH, STATES),
        "D": draw(shared, WIDTH),
        "z": draw(*tokens),
        "delta_bias": draw(directions, WIDTH),
    }
    return {name: jax.device_put(array) for name, array in arrays.items()}


def orders(directions: int) -> jax.Array:
    return jax.device_put(np.argsort(draw(directions, BATCH, LENGTH), axis=-1).astype(np.int32))


def places(directions: int) -> jax.Array:
    steps = np.random.default_rng(1).integers(1, 4, size=(directions, BATCH, LENGTH))
    return jnp.asarray(np.cumsum(steps, axis=-1), jnp.int32)


def one_by_one(arrays: dict[str, Any], reverse: tuple[bool, ...], order, positions, reorder_parameters) -> jax.Array:
    """The definition, from the public op for one direction."""
    arrays = dict(arrays)
    z, total = arrays.pop("z"), 0.0
    rows = jnp.arange(BATCH)[:, None]
    for g, backwards in enumerate(reverse):
        one = {name: array[min(g, len(array) - 1)] for name, array in arrays.items()}
        if order is not None:
            for name in ("u", "delta", "B", "C") if reorder_parameters else ("u",):
                one[name] = one[name][rows, order[g]]
        alignment = "none" if positions is None else "decay"
        at = None if positions is None else positions[g]
        y = selective_scan(**one, positions=at, alignment=alignment, reverse=backwards, implementation="reference")
        total += y if order is None else jnp.zeros_like(y).at[rows, order[g]].set(y)
    return total * jax.nn.silu(z)


def graded(run: Any, arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(output, gradients of a weighted sum of y)."""

    def loss(arrays: dict[str, Any]) -> tuple[jax.Array, Any]:
        out = run(arrays)
        y = out[0] if isinstance(out, tuple) else out
        return jnp.sum(y.astype(jnp.float32) * draw(BATCH, LENGTH, WIDTH)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(arrays)
    return out, grads


def assert_close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    assert relative_error(got, want) <= tolerance


CASES = {
    "vim": dict(reverse=(False, True), shared=2),
    "vim, decay": dict(reverse=(False, True), shared=2, decay=True),
    "plain_mamba": dict(reverse=(False,) * 2, shared=1, order=True, decay=True, reorder_parameters=False),
    "plain_mamba, reordered": dict(reverse=(False, True, False), shared=1, order=True, reorder_parameters=True),
    "one": dict(reverse=(True,), shared=1),
}


def arguments(case: str) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays and settings of a case."""
    settings = {"order": False, "decay": False, "reorder_parameters": True, **CASES[case]}
    count = len(settings["reverse"])
    settings["order"] = orders(count) if settings["order"] else None
    settings["positions"] = places(count) if settings["decay"] else None
    return inputs(count, settings["shared"]), settings


@functools.cache
def expected(case: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Output and gradients by the definition, for every implementation."""
    arrays, settings = arguments(case)
    names = ("reverse", "order", "positions", "reorder_parameters")
    return graded(lambda arrays: one_by_one(arrays, *(settings[name] for name in names)), arrays)


# "vim, decay" and "plain_mamba" have all that these two have.
SLOW_CASES = ("vim", "one")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW_CASES else ()) for case in CASES]
)
@pytest.mark.parametrize("name", ALL)
def test_equals_the_directions_one_by_one(name, case):
    arrays, settings = arguments(case)

    def run(arrays: dict[str, Any]) -> Any:
        return directional_scan(
            **arrays,
            **{name: settings[name] for name in ("reverse", "order", "positions", "reorder_parameters")},
            alignment="decay" if settings["decay"] else "hold",
            score="clip",
            implementation="triton" if name == "triton_interpreter" else name,
        )

    (y, score), grads = graded(run, arrays)
    want, want_grads = expected(case)
    assert_close(y, want)
    assert_close(score, np.maximum(want, 0).mean(axis=-1))
    for key, grad in want_grads.items():
        assert_close(grads[key], grad)


# What the cases above are too small for. One or two channels a thread, whole and ragged blocks, B and C ahead or not,
# states rebuilt or all saved, a chunk longer than the image.
PATHS = {
    "two channels, bfloat16": dict(width=64, states=16, dtype="bfloat16"),
    "two channels, ragged, gaps": dict(width=70, states=8, decay=True, length=14, reverse=(True,)),
    "both ways, float16": dict(width=64, dtype="float16", order=True, reverse=(False, True), decay=True),
    "64 states": dict(width=12, states=64, length=5),
    "three segments, rebuilt": dict(length=19, decay=True, reverse=(True,), blocks=Blocks(8, 4, 8, 1, 4, 8, 1)),
    "all saved": dict(length=9, order=True, decay=True, blocks=Blocks(4, 4, 8, 1, 4, 8, 1)),
    "short image": dict(length=2, decay=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [pytest.param("triton_interpreter", marks=pytest.mark.triton),
                                  pytest.param("triton", marks=pytest.mark.gpu)])  # fmt: skip
def test_paths_of_the_triton_kernels(name, path):
    case = dict(width=WIDTH, states=STATES, length=LENGTH, dtype="float32", reverse=(False,), order=False, decay=False)
    case |= {"blocks": None} | PATHS[path]
    count, tokens = len(case["reverse"]), (1, case["length"], case["width"])
    arrays = {"u": draw(1, *tokens), "delta": draw(count, *tokens), "z": draw(*tokens)}
    arrays = {name: array.astype(jnp.dtype(case["dtype"])) for name, array in arrays.items()}
    arrays |= {"A": -np.exp(draw(count, case["width"], case["states"])), "D": draw(count, case["width"])}
    arrays |= {"B": draw(count, *tokens[:2], case["states"]), "C": draw(1, *tokens[:2], case["states"])}
    steps = (count, 1, case["length"])
    options = {
        "reverse": case["reverse"],
        "order": np.argsort(draw(*steps), axis=-1).astype(np.int32) if case["order"] else None,
        "positions": np.cumsum(np.full(steps, 2, np.int32), axis=-1, dtype=np.int32) if case["decay"] else None,
        "alignment": "decay" if case["decay"] else "none",
    }

    def run(implementation: str, blocks: Blocks | None) -> Any:
        def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            y, _ = directional_scan(**arrays, **options, implementation=implementation, blocks=blocks)
            return jnp.sum(y.astype(jnp.float32) * draw(*tokens)), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(arrays)
        return {"y": y, **grads}

    got, want = run("triton", case["blocks"]), run("xla", None)
    errors = {key: relative_error(got[key], want[key]) for key in want}
    assert max(errors.values()) <= {"float32": TOLERANCE, "float16": 2**-9, "bfloat16": 2**-6}[case["dtype"]], errors


# Every score is computed from y in one place, and the models' tests use all of them.
@pytest.mark.parametrize(
    "score", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("noclip", "l1", "l2"))]
)
@pytest.mark.parametrize("name", ALL)
def test_scores(name, score):
    arrays, implementation = inputs(2, 2), "triton" if name == "triton_interpreter" else name

    def run(arrays: dict[str, Any]) -> tuple[jax.Array, Any]:
        y, scores = directional_scan(**arrays, reverse=(False, True), score=score, implementation=implementation)
        return jnp.sum(scores), (scores, token_score(y, score))

    (_, (got, want)), grads = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=FAST)(arrays)
    assert got.dtype == jnp.float32
    assert_close(got, want)
    assert not any(np.abs(grad).max() for grad in grads.values())  # a score carries no gradient


@pytest.mark.parametrize("name", ["reference", "xla", "pallas_interpret"])
def test_bfloat16_is_summed_in_float32(name):
    """The kernels write each direction's y in bfloat16; only the sum, the gate and the score are float32."""
    arrays = {key: jnp.bfloat16(a) if a.ndim > 2 and key != "A" else a for key, a in inputs(2, 2).items()}

    def run(arrays: dict[str, Any]) -> Any:
        exact = {key: a.astype(jnp.float32) for key, a in arrays.items()}
        exact = one_by_one(exact, (False, True), None, None, True)
        scanned = directional_scan(**arrays, reverse=(False, True), score="clip", implementation=name)
        return scanned, (exact, token_score(exact, "clip"))

    (y, score), (exact, exact_score) = jax.jit(run, compiler_options=FAST)(arrays)
    assert y.dtype == jnp.bfloat16
    rounded_parts = name == "pallas_interpret"
    assert_close(y, exact, 2**-7 if rounded_parts else 2**-8)
    assert_close(score, exact_score, 2**-7 if rounded_parts else 1e-5)  # before the sum is rounded


def test_blocks_may_be_given():
    arrays, blocks = inputs(1, 1), Blocks(3, 3, 2, 1, 3, 8, 1)

    def run(arrays: dict[str, Any]) -> Any:
        got, _ = directional_scan(**arrays, reverse=(False,), implementation="pallas_interpret", blocks=blocks)
        return got, one_by_one(arrays, (False,), None, None, True)

    assert_close(*jax.jit(run, compiler_options=FAST)(arrays))
    with pytest.raises(InputError, match="blocks .* 'xla'"):
        directional_scan(**arrays, reverse=(False,), implementation="xla", blocks=blocks)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "change, values",
    [
        ({"reverse": ()}, r"reverse .* \(\)"),
        ({"reverse": (False, True, False)}, r"u .* \(2, 2, 11, 5\)"),
        ({"u": jax.device_put(draw(LENGTH, WIDTH))}, r"u .* \(11, 5\)"),
        ({"z": jax.device_put(draw(2, BATCH, LENGTH, WIDTH))}, r"z .* \(2, 2, 11, 5\)"),
        ({"delta": jax.device_put(draw(2, BATCH, LENGTH, WIDTH).astype(np.int32))}, "delta .* int32; .* float32"),
        ({"order": jax.device_put(np.asarray(orders(2))[0])}, r"order .* int32\[2, 11\]; .* int32\[2, 2, 11\]"),
        ({"order": jax.device_put(np.asarray(orders(2)) + 1)}, "order of direction 0, image 0"),
        ({"order": jax.device_put(np.asarray(orders(2)) * 0)}, "order of direction 0, image 0"),
        ({"reverse": ("no", "yes")}, "reverse .* 'no'"),
        ({"reverse": True}, "reverse .* True"),
        ({"blocks": (5, 8, 1, 8, 1), "implementation": "pallas_interpret"}, r"blocks=\(5, 8, 1, 8, 1\)"),
        ({"score": ["clip"]}, r"score=\['clip'\]"),
        ({"alignment": "decay"}, "alignment='decay'"),
        ({"positions": orders(2), "alignment": "decay"}, "positions of image"),
        ({"score": "best"}, "score='best'"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
    ],
)
def test_rejects(change, values):
    with pytest.raises(InputError, match=values):
        directional_scan(**{**inputs(2, 2), "reverse": (False, True), **change})
