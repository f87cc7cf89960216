"""One contract for every implementation of the scan; a new implementation is a line in `IMPLEMENTATIONS`.

`triton_interpreter` is the implementation `triton`, run by Triton's interpreter (conftest.py).
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from compilation import EXACT

from top_jax import ops
from top_jax.ops import selective_scan

# name -> what its program must contain, as proof that this implementation ran; and the marks of its tests.
IMPLEMENTATIONS = {
    "reference": (None, ()),
    "xla": ("custom_vjp_call", ()),
    "pallas_interpret": ("pallas_call", ()),
    "triton_interpreter": ("pure_callback", (pytest.mark.triton,)),
    "pallas": ("pallas_call", (pytest.mark.gpu,)),
    "triton": ("triton_kernel_call", (pytest.mark.gpu,)),
}
ALL = [pytest.param(name, marks=marks) for name, (_, marks) in IMPLEMENTATIONS.items()]
AGAINST_REFERENCE = ALL[1:]

# Largest error, relative to the largest value of the array compared.
TOLERANCE = {
    "official": 5e-6,  # float32 sums in another order than PyTorch's; float32 against float64 already gives 1e-6
    "float32": 5e-6,  # the same, between two of ours; a GPU's exp2 and division are good to 2 units of 2**-23
    "float32 gradient": 2e-5,  # sums over up to B L terms that cancel in part
    "bfloat16": 2**-8,  # computed in float32 and rounded once, to 8 bits
    "bfloat16 gradient": 2**-7,  # likewise, and rounded on both sides
    "bfloat16 of a kernel": 2**-7,  # rounded before and after the gate; Triton's interpreter also drops bits
}

# The quick tests scan each way with one alignment or without; under the mark `slow` all ways are combined.
BACKWARDS = [False, pytest.param(True, marks=pytest.mark.slow)]
# Most of the time is compilation, so tests without a special size share this one: B, L, E, N.
BASE = (2, 9, 5, 3)
# length -> E, N, (reverse, alignment): lengths around multiples of 8, a short image, a ViM image.
SIZES = {
    1: (5, 16, (False, "decay")),
    2: (1, 3, (True, "hold")),
    7: (32, 1, (True, "decay")),
    8: (5, 16, (False, "hold")),
    17: (1, 1, (False, "decay")),
    65: (32, 16, (True, "decay")),
    197: (5, 3, (False, "hold")),
}
SLOW_LENGTHS = (1, 2, 7, 17)  # of 1, 7 and 17 tokens are also official scans
WAYS = tuple(itertools.product((False, True), ("hold", "decay")))


def assert_close(got, want, tolerance: str, dtype: str = "") -> None:
    """Both are (output, gradients)."""
    assert relative_error(got[0], want[0]) < TOLERANCE[tolerance]
    assert got[1].keys() == want[1].keys()
    gradients = TOLERANCE.get(f"{tolerance} gradient", TOLERANCE[tolerance])
    errors = {name: relative_error(got[1][name], want[1][name]) for name in want[1]}
    assert max(errors.values()) < gradients, errors


def test_every_implementation_is_under_contract():
    assert set(ops.IMPLEMENTATIONS) == {"auto", *IMPLEMENTATIONS} - {"triton_interpreter"}


def named(name: str) -> str:
    return "triton" if name == "triton_interpreter" else name


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
def test_the_named_implementation_runs(name, make_inputs):
    inputs, marker = make_inputs(1, 4, 2, 2), IMPLEMENTATIONS[name][0]
    program = str(jax.make_jaxpr(lambda inputs: selective_scan(**inputs, implementation=named(name)))(inputs))
    other = str(jax.make_jaxpr(lambda inputs: selective_scan(**inputs, implementation="reference"))(inputs))
    assert marker in program and marker not in other


@pytest.fixture(scope="module")
def official_scans(fixtures):
    """Case -> arrays of the official reference scan, tokens before channels as ours."""
    turned = {"u", "delta", "z", "B", "C", "out", "cotangent"}
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(fixtures / "selective_scan.npz") as arrays:
        for key in arrays.files:
            case, name = key.split("/")
            turn = name.removeprefix("grad_") in turned
            cases.setdefault(case, {})[name] = np.swapaxes(arrays[key], 1, 2) if turn else arrays[key]
    return cases


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("name", ALL)
def test_official_scan(name, case, official_scans, run_scan):
    arrays = official_scans[str(case)]
    gradients = {key.removeprefix("grad_"): array for key, array in arrays.items() if key.startswith("grad_")}
    inputs = {key: jnp.asarray(arrays[key]) for key in gradients}
    got = run_scan(inputs, arrays["cotangent"], implementation=name)
    assert_close(got, (arrays["out"], gradients), "official")


def _sizes() -> list:
    """The base size in two ways, most other sizes in one way; the rest under the mark `slow`."""
    cases = [(BASE[1:], way, way in ((False, "hold"), (True, "decay"))) for way in WAYS]
    cases += [
        ((length, *sizes), way, way == quick and length not in SLOW_LENGTHS)
        for length, (*sizes, quick) in SIZES.items()
        for way in WAYS
    ]
    return [
        pytest.param(
            (2, *sizes),
            *way,
            marks=() if quick else pytest.mark.slow,
            id="L{}-E{}-N{}-{}-{}".format(*sizes, "reverse" if way[0] else "forward", way[1]),
        )
        for sizes, way, quick in cases
    ]


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
@pytest.mark.parametrize("sizes, reverse, alignment", _sizes())
def test_sizes(name, sizes, reverse, alignment, make_inputs, make_positions, run_scan):
    run = functools.partial(
        run_scan, make_inputs(*sizes), positions=make_positions(*sizes[:2]), reverse=reverse, alignment=alignment
    )
    assert_close(run(implementation=name), run(implementation="reference"), "float32")


@pytest.mark.slow  # test_official_scan has cases without each of them
@pytest.mark.parametrize("name", AGAINST_REFERENCE)
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_inputs(name, without, make_inputs, run_scan):
    inputs = make_inputs(*BASE, without=without)
    assert_close(run_scan(inputs, implementation=name), run_scan(inputs, implementation="reference"), "float32")


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
@pytest.mark.parametrize(
    "length, reverse, alignment", [(9, True, "hold"), pytest.param(33, False, "decay", marks=pytest.mark.slow)]
)
def test_bfloat16(name, length, reverse, alignment, make_inputs, make_positions, run_scan):
    inputs = make_inputs(2, length, 5, 16, dtype="bfloat16")
    run = functools.partial(run_scan, inputs, positions=make_positions(2, length), reverse=reverse, alignment=alignment)
    out, grads = run(implementation=name)
    assert out.dtype == jnp.bfloat16
    assert {key: array.dtype for key, array in grads.items()} == {k: a.dtype for k, a in inputs.items()}
    tolerance = "bfloat16" if name == "xla" else "bfloat16 of a kernel"
    assert_close((out, grads), run(implementation="reference"), tolerance)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_keeps_a_float32_state(name, make_inputs):
    # A thousand additions of 1 with no decay: a bfloat16 state stops growing at 256.
    inputs = {key: np.ones((1, 1000, 1), jnp.bfloat16) for key in ("u", "B", "C")}
    inputs |= {"delta": np.full((1, 1000, 1), np.log(np.e - 1), np.float32), "A": np.zeros((1, 1), np.float32)}
    y = jax.jit(functools.partial(selective_scan, implementation=named(name)))(**inputs)
    np.testing.assert_allclose(np.asarray(y[0, -1, 0], np.float32), 1000, rtol=2**-8)


@pytest.mark.parametrize("reverse", BACKWARDS)
@pytest.mark.parametrize("name", ALL)
def test_hold_is_the_recurrence_without_gaps(name, reverse, make_inputs, make_positions, run_scan):
    run = functools.partial(run_scan, make_inputs(*BASE), implementation=name, reverse=reverse)
    want = run()
    got = run(positions=make_positions(*BASE[:2]), alignment="hold")
    jax.tree.map(np.testing.assert_array_equal, got, want)


# `hold` ignores all positions: test_hold_is_the_recurrence_without_gaps.
@pytest.mark.parametrize("alignment", ["decay", pytest.param("hold", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reverse", BACKWARDS)
@pytest.mark.parametrize("name", ALL)
def test_keeping_everything_is_the_dense_scan(name, reverse, alignment, make_inputs):
    inputs, everything = make_inputs(*BASE), jnp.asarray(np.tile(np.arange(BASE[1], dtype=np.int32), (2, 1)))
    scan = functools.partial(selective_scan, implementation=named(name), reverse=reverse)

    def run(alignment, positions=None):
        run = jax.jit(lambda inputs: scan(**inputs, alignment=alignment, positions=positions), compiler_options=EXACT)
        return run(inputs)

    np.testing.assert_array_equal(run(alignment, everything), run("none"))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["exact", "optimised"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_keeping_everything_is_the_dense_scan_where_gradients_follow(name, reverse, level, make_inputs, run_scan):
    run = functools.partial(run_scan, make_inputs(*BASE), implementation=name, reverse=reverse, level=level)
    everything = jnp.tile(jnp.arange(BASE[1], dtype=jnp.int32), (2, 1))
    dense, _ = run()
    for alignment in ("hold", "decay"):
        kept, _ = run(positions=everything, alignment=alignment)
        np.testing.assert_array_equal(kept, dense)


@pytest.mark.parametrize(
    "alignment, reverse",
    [
        ("hold", False),
        ("decay", True),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in (("hold", True), ("decay", False))),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_aligned_scan_is_the_masked_full_scan(
    name, alignment, reverse, make_inputs, make_positions, run_scan, scan_forward
):
    """The definition: pruned positions stay in the sequence, with u = 0 and, after softplus, delta_prev (or 0)."""
    full_length, inputs, positions = 29, make_inputs(*BASE), np.asarray(make_positions(*BASE[:2]))
    assert positions.max() < full_length and (np.diff(positions) > 1).any()
    delta, bias = np.asarray(inputs["delta"], np.float64), np.asarray(inputs["delta_bias"], np.float64)
    after_softplus = np.logaddexp(0, delta + bias)

    full = {key: np.array(array) for key, array in make_inputs(2, full_length, 5, 3, seed=1).items()}
    full |= {"A": inputs["A"], "D": inputs["D"], "delta_bias": np.zeros(5, np.float32)}
    full["u"][:] = 0.0
    full["delta"][:] = -1e4  # 0 after softplus
    for image, row in enumerate(positions):
        for key in ("u", "B", "C", "z"):
            full[key][image, row] = np.asarray(inputs[key])[image]
        for place in range(full_length):
            met = np.flatnonzero(row >= place)[:1] if reverse else np.flatnonzero(row <= place)[-1:]
            if len(met) and (place in row or alignment == "decay"):
                full["delta"][image, place] = np.log(np.expm1(after_softplus[image, met[0]]))  # softplus undone

    want = np.asarray(scan_forward(full, implementation=name, reverse=reverse))
    want = np.take_along_axis(want, positions[:, :, None], axis=1)
    # Gradients are not asked for, but other tests share the program that has them.
    got, _ = run_scan(
        inputs, implementation=name, reverse=reverse, positions=jnp.asarray(positions), alignment=alignment
    )
    assert relative_error(got, want) < TOLERANCE["float32"]
    if alignment == "decay":  # and the gaps are felt
        assert relative_error(got, scan_forward(inputs, implementation=name, reverse=reverse)) > 1e-2


@pytest.mark.parametrize("name", ALL)
def test_images_do_not_influence_each_other(name, make_inputs, make_positions, run_scan, scan_forward):
    inputs, positions = make_inputs(*BASE), make_positions(*BASE[:2])
    inputs, positions = jax.tree.map(np.array, (inputs, positions))  # whose rows are changed without a program
    per_image = {key: array for key, array in inputs.items() if array.ndim == 3}
    cotangent = jax.device_put(np.random.default_rng(3).normal(size=inputs["u"].shape).astype(np.float32))
    options = {"alignment": "decay", "implementation": name, "reverse": False}
    together, together_grads = run_scan(inputs, cotangent, positions=positions, **options)

    # Rows are bit-equal in a batch of the same size, whatever its other images ...
    apart_inputs, apart_positions = {**inputs}, positions.copy()
    for key in ("u", "B", "C", "z"):
        apart_inputs[key] = inputs[key].copy()
        apart_inputs[key][1:] = 1e3
    apart_positions[1:] += 5
    apart, apart_grads = run_scan(apart_inputs, cotangent, positions=apart_positions, **options)
    first = lambda array: np.asarray(array)[0]  # noqa: E731
    np.testing.assert_array_equal(first(apart), first(together))
    for key in per_image:
        np.testing.assert_array_equal(first(apart_grads[key]), first(together_grads[key]))
    # ... and equal up to rounding in another batch size, a different program whose sums may have another order.
    alone_inputs = {**inputs, **{key: array[:1] for key, array in per_image.items()}}
    alone = scan_forward(alone_inputs, positions=positions[:1], **options)
    assert relative_error(first(alone), first(together)) < 1e-6


@pytest.mark.parametrize("reverse", BACKWARDS)
@pytest.mark.parametrize("name", ALL)
def test_extreme_decays_stay_finite(name, reverse, make_inputs, run_scan):
    # delta 50 and A = -16: exp(-800) underflows, and exp(+800), which a division by decays would meet, overflows.
    batch, length, width, states = BASE
    delta = np.full((batch, length, width), 50.0)
    delta[:, 2], delta[:, 4], delta[:, 6] = -1e4, 1e-3, 1e4
    extreme = {"A": jnp.full((width, states), -16.0), "delta": jnp.asarray(delta, jnp.float32)}
    positions = jnp.asarray(np.tile(np.arange(length) * 100, (batch, 1)), jnp.int32)
    inputs = {**make_inputs(*BASE), **extreme}
    out, grads = run_scan(inputs, positions=positions, alignment="decay", reverse=reverse, implementation=name)
    for array in jax.tree.leaves((out, grads)):
        assert np.isfinite(array).all()
    assert np.abs(grads["u"]).max() > 1  # not by being zero


@pytest.mark.parametrize("name", ALL)
def test_two_runs_are_bit_equal(name, make_inputs, make_positions, run_scan):
    inputs, positions = make_inputs(2, 65, 32, 16), make_positions(2, 65)
    run = functools.partial(run_scan, inputs, positions=positions, alignment="decay", reverse=True)
    jax.tree.map(np.testing.assert_array_equal, run(implementation=name), run(implementation=name))


def test_memory_of_the_gradient(make_inputs):
    """No array of B L E N: one in every 8 states is kept. The reference's autodiff keeps them all.

    Only for `xla`: the memory of an interpreter says nothing about the kernel.
    """
    batch, length, width, states = 2, 512, 32, 64
    inputs = make_inputs(batch, length, width, states)
    all_states = 4 * batch * length * width * states  # bytes

    def scratch(name: str) -> int:
        grad = jax.jit(jax.grad(lambda inputs: jnp.sum(selective_scan(**inputs, implementation=name))))
        return grad.lower(inputs).compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes

    assert scratch("reference") > all_states
    assert scratch("xla") < all_states / 2


@pytest.mark.parametrize("name", ALL)
def test_vmap(name, make_inputs, make_positions, run_scan):
    stacked = [make_inputs(*BASE, seed=seed) for seed in range(3)]
    positions = np.stack([make_positions(*BASE[:2], seed=seed) for seed in range(3)])
    inputs = jax.tree.map(lambda *arrays: np.stack(arrays), *stacked)
    options = {"alignment": "decay", "reverse": False}

    def graded(inputs, positions):
        scan = functools.partial(selective_scan, positions=positions, implementation=named(name), **options)
        out, pull_back = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return out, pull_back(jnp.ones_like(out))[0]

    got = jax.jit(jax.vmap(graded), compiler_options={"xla_backend_optimization_level": 0})(inputs, positions)
    for index, one in enumerate(stacked):
        cotangent = np.ones(one["u"].shape, np.float32)
        want = run_scan(one, cotangent, positions=positions[index], implementation=name, **options)
        assert_close(jax.tree.map(lambda array, index=index: np.asarray(array)[index], got), want, "float32")
