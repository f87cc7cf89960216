"""The aligned selective scan as Pallas kernels: for a GPU with JAX alone, and for any machine in interpret mode.

The algorithm is that of `triton_kernels.py` (docs/concepts/kernels.md): one program per image and block of channels,
all directions in turn, the state in registers. No masks are needed: channels and states are padded to whole blocks, and
the last steps, which do not fill a chunk, are a shorter chunk.

Letters: g direction, i place in the scan's own order, step = i counted from the front of the image, token = the row
that step visits, row = the row its delta, B and C are read from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from top_jax.errors import InputError

from .blocks import Blocks, power_of_two
from .operands import TOKEN_WORTH, ScanArguments, ScanGradients, ScanOutputs, ScanPlan

LN_2 = 0.6931471805599453
_LARGEST_INDEX = 2**31 - 1


def pallas_forward(
    arguments: ScanArguments,
    z: jax.Array | None,
    plan: ScanPlan,
    blocks: Blocks,
    *,
    save: bool,
    interpret: bool = False,
) -> ScanOutputs:
    """Runs the forward kernel; `save` keeps the chunk-start states for the backward."""
    batch, length, real_width, _ = arguments.sizes
    width, states = _padded_sizes(arguments, blocks.forward_channels)
    directions = len(plan.reverse)
    chunks = -(-length // blocks.chunk)
    like = {
        "out": _Array((batch, length, width), arguments.u.dtype, "B L E"),
        "total": _Array((batch, length, width), jnp.float32, "B L E") if directions > 1 else None,
        "starts": _Array((directions, batch, chunks, width, states), jnp.float32, "G B c E N") if save else None,
        "score": _Array((width // blocks.forward_channels, batch, length), jnp.float32, "b B L")
        if plan.score
        else None,
    }
    results = _call(
        functools.partial(_forward_kernel, plan, blocks.chunk, interpret),
        _inputs(arguments, z, width, states),
        like,
        (batch, width // blocks.forward_channels),
        blocks.forward_channels,
        blocks.forward_warps,
        interpret,
    )
    return ScanOutputs(results["out"][..., :real_width], results["score"], results["starts"])


def pallas_backward(
    arguments: ScanArguments,
    z: jax.Array | None,
    starts: jax.Array,
    dout: jax.Array,
    plan: ScanPlan,
    blocks: Blocks,
    *,
    interpret: bool = False,
) -> ScanGradients:
    """Runs the backward kernel on the forward's arguments and states, and the cotangent of its `out`."""
    batch, length, real_width, real_states = arguments.sizes
    width, states = _padded_sizes(arguments, blocks.backward_channels)
    directions = len(plan.reverse)
    inputs = _inputs(arguments, z, width, states)
    inputs["starts"] = _Operand(_resized(starts, {3: width, 4: states}), "G B c E N")
    inputs["dout"] = _Operand(_resized(dout, {2: width}), "B L E")
    programs, per_token = width // blocks.backward_channels, (directions, batch, length, width)
    like = {
        "du": _Array(per_token, arguments.u.dtype, "G B L E"),
        "ddelta": _Array(per_token, arguments.delta.dtype, "G B L E"),
        "dA": _Array((directions, batch, width, states), jnp.float32, "G B E N"),
        "dB": _Array((programs, directions, batch, length, states), jnp.float32, "b G B L N"),
        "dC": _Array((programs, directions, batch, length, states), jnp.float32, "b G B L N"),
        "dD": _Array((directions, batch, width), jnp.float32, "G B E"),
        "dbias": _Array((directions, batch, width), jnp.float32, "G B E"),
        "dz": None if z is None else _Array((batch, length, width), z.dtype, "B L E"),
        "total": None if z is None or directions == 1 else _Array((batch, length, width), jnp.float32, "B L E"),
    }
    grads = _call(
        functools.partial(_backward_kernel, plan, blocks.chunk, interpret),
        inputs,
        like,
        (batch, programs),
        blocks.backward_channels,
        blocks.backward_warps,
        interpret,
    )
    return ScanGradients(
        u=grads["du"][..., :real_width],
        delta=grads["ddelta"][..., :real_width],
        A=grads["dA"][:, :, :real_width, :real_states],
        B=grads["dB"][..., :real_states],
        C=grads["dC"][..., :real_states],
        D=grads["dD"][..., :real_width],
        delta_bias=grads["dbias"][..., :real_width],
        z=None if grads["dz"] is None else grads["dz"][..., :real_width],
    )


Refs = dict[str, Any]
Row = dict[str, Any]  # arrays and their indices, int or traced


def _forward_kernel(plan: ScanPlan, chunk: int, interpret: bool, refs: Refs) -> None:
    length = refs["out"].shape[0]

    def sweep(g: Any) -> None:
        a = refs["A"][g]

        def run(c: Any, carry: tuple[jax.Array, jax.Array], steps: int) -> tuple[jax.Array, jax.Array]:
            h, dt_before = carry
            if "starts" in refs:
                refs["starts"][g, c] = h
            rows = [_load(refs, plan, g, c * chunk + s, ("u", "delta", "B", "C")) for s in range(steps)]
            for row in rows:
                dt = _softplus(row["delta"] + refs["delta_bias"][g])
                tau = dt + row["gap"] * dt_before if "gap" in refs else dt
                dt_before = dt
                h = jnp.exp2(tau[:, None] * a) * h + (dt * row["u"])[:, None] * row["B"][None, :]
                y = jnp.sum(h * row["C"][None, :], axis=1) + refs["D"][g] * row["u"]
                _finish(refs, plan, g, row["token"], y)
            return h, dt_before

        start = (jnp.zeros(a.shape, jnp.float32), jnp.zeros(a.shape[:1], jnp.float32))
        _over_chunks(run, start, length, chunk)

    _over_directions(sweep, plan, interpret)


def _finish(refs: Refs, plan: ScanPlan, g: Any, token: Any, y: jax.Array) -> None:
    """Adds a direction's y to the sum; the last direction gates, stores and scores it."""
    total = _sum_so_far(refs, plan, g, token, y)

    @_if_last(plan, g)
    def store() -> None:
        y = total
        if "z" in refs:
            gate = refs["z"][token].astype(jnp.float32)
            y *= gate * _sigmoid(gate)
        refs["out"][token] = y.astype(refs["out"].dtype)
        if plan.score:
            refs["score"][token] = jnp.sum(TOKEN_WORTH[plan.score](y), axis=0)


class _Adjoint(NamedTuple):
    """Values that the backward carries from step to step."""

    h: jax.Array  # [E block, N], cotangent of the state
    A: jax.Array  # [E block, N]
    D: jax.Array  # [E block]
    delta_bias: jax.Array  # [E block]
    from_gap: jax.Array  # [E block], gradient of dt through the gap after its token


def _backward_kernel(plan: ScanPlan, chunk: int, interpret: bool, refs: Refs) -> None:
    length, _ = refs["dout"].shape

    def sweep(g: Any) -> None:
        a = refs["A"][g]

        def run(c: Any, adjoint: _Adjoint, steps: int) -> _Adjoint:
            carried, taus = _rebuild(refs, plan, g, c, chunk, steps, a)
            for s in reversed(range(steps)):
                row = _load(refs, plan, g, c * chunk + s, ("u", "delta", "B", "C"))
                adjoint = _pull_back(refs, plan, g, row, adjoint, carried[s], taus[s], a)
            return adjoint

        matrix, vector = jnp.zeros(a.shape, jnp.float32), jnp.zeros(a.shape[:1], jnp.float32)
        end = _over_chunks(run, _Adjoint(matrix, matrix, vector, vector, vector), length, chunk, backwards=True)
        refs["dA"][g], refs["dD"][g], refs["dbias"][g] = end.A, end.D, end.delta_bias

    _over_directions(sweep, plan, interpret)


def _rebuild(
    refs: Refs, plan: ScanPlan, g: Any, c: Any, chunk: int, steps: int, a: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Runs the forward again through a chunk; returns each step's decayed state (decay * h) and tau."""
    h, bias = refs["starts"][g, c], refs["delta_bias"][g]
    dt_before = jnp.zeros_like(bias)
    if "gap" in refs:
        before = _load(refs, plan, g, jnp.maximum(c * chunk - 1, 0), ("delta",))
        dt_before = jnp.where(c > 0, _softplus(before["delta"] + bias), 0.0)
    carried, taus = [], []
    for s in range(steps):
        row = _load(refs, plan, g, c * chunk + s, ("u", "delta", "B"))
        dt = _softplus(row["delta"] + bias)
        taus.append(dt + row["gap"] * dt_before if "gap" in refs else dt)
        dt_before = dt
        carried.append(jnp.exp2(taus[s][:, None] * a) * h)
        h = carried[s] + (dt * row["u"])[:, None] * row["B"][None, :]
    return carried, taus


def _pull_back(
    refs: Refs, plan: ScanPlan, g: Any, row: Row, adjoint: _Adjoint, carried: jax.Array, tau: jax.Array, a: jax.Array
) -> _Adjoint:
    """Runs one step of the backward, which docs/concepts/kernels.md derives."""
    token, raw = row["token"], row["delta"] + refs["delta_bias"][g]
    x, B, C, D, dt = row["u"], row["B"], row["C"], refs["D"][g], _softplus(raw)
    drive = dt * x
    dy = _output_gradient(
        refs, plan, g, token, jnp.sum((carried + drive[:, None] * B[None, :]) * C[None, :], axis=1) + D * x
    )

    refs["dC"][g, row["row"]] = jnp.sum(carried * dy[:, None], axis=0) + B * jnp.sum(drive * dy, axis=0)
    dh = adjoint.h + dy[:, None] * C[None, :]
    refs["dB"][g, row["row"]] = jnp.sum(dh * drive[:, None], axis=0)
    ddrive = jnp.sum(dh * B[None, :], axis=1)
    dexponent = dh * carried
    dtau = jnp.sum(dexponent * a, axis=1) * LN_2  # a is log2(e) A

    ddt = ddrive * x + dtau + adjoint.from_gap
    draw = ddt * _sigmoid(raw)
    refs["du"][g, token] = (ddrive * dt + D * dy).astype(refs["du"].dtype)
    refs["ddelta"][g, row["row"]] = draw.astype(refs["ddelta"].dtype)
    return _Adjoint(
        h=dh * jnp.exp2(tau[:, None] * a),
        A=adjoint.A + dexponent * tau[:, None],
        D=adjoint.D + dy * x,
        delta_bias=adjoint.delta_bias + draw,
        from_gap=row["gap"] * dtau if "gap" in refs else adjoint.from_gap,
    )


def _output_gradient(refs: Refs, plan: ScanPlan, g: Any, token: Any, y: jax.Array) -> jax.Array:
    """The cotangent of the sum over directions. The last direction, which has the whole sum, stores that of z."""
    dout = refs["dout"][token].astype(jnp.float32)
    if "z" not in refs:
        return dout
    gate = refs["z"][token].astype(jnp.float32)
    share = _sigmoid(gate)
    total = _sum_so_far(refs, plan, g, token, y)

    @_if_last(plan, g)
    def store() -> None:
        refs["dz"][token] = (dout * total * share * (1.0 + gate * (1.0 - share))).astype(refs["dz"].dtype)

    return dout * gate * share


def _sum_so_far(refs: Refs, plan: ScanPlan, g: Any, token: Any, y: jax.Array) -> jax.Array:
    """Sums a token's y over the directions up to this one, and leaves the sum in `total` for the next."""
    last = len(plan.reverse) - 1
    if not last:
        return y
    y += jnp.where(g > 0, refs["total"][token], 0.0)  # uninitialised before the first direction

    @pl.when(g < last)
    def store() -> None:
        refs["total"][token] = y

    return y


def _if_last(plan: ScanPlan, g: Any) -> Callable[[Callable[[], None]], None]:
    """Decorates a function that only the last direction runs."""
    last = len(plan.reverse) - 1
    return pl.when(g == last) if last else lambda run: run()


def _load(refs: Refs, plan: ScanPlan, g: Any, i: Any, names: tuple[str, ...]) -> Row:
    """Loads the float32 rows `[E block]` or `[N]` of place i of direction g, with the indices of its token and row."""
    length = refs["u"].shape[1]
    step = jnp.where(_backwards(plan, g), length - 1 - i, i) if any(plan.reverse) else i
    token = refs["order"][g, step] if "order" in refs else step
    row: Row = {"token": token, "row": token if plan.reorder_parameters else step}
    for name in names:
        ref = refs[name]
        shared = 0 if len(ref) == 1 else g
        row[name] = ref[shared, token if name == "u" else row["row"]].astype(jnp.float32)
    if "gap" in refs:
        row["gap"] = refs["gap"][g, step]
    return row


def _backwards(plan: ScanPlan, g: Any) -> Any:
    """Whether direction g, int or traced, scans its steps from the last to the first."""
    bits = sum(backwards << number for number, backwards in enumerate(plan.reverse))
    return (bits >> g) & 1 == 1


def _over_directions(sweep: Callable[[Any], None], plan: ScanPlan, interpret: bool) -> None:
    """Runs one sweep after the other in a loop; unrolled, four would take a minute to compile."""
    if len(plan.reverse) == 1:
        sweep(0)
        return

    def run(g: Any, nothing: None) -> None:
        sweep(g)
        if not interpret:
            plgpu.debug_barrier()  # the next sweep reads what other threads of this program wrote to `total`

    jax.lax.fori_loop(0, len(plan.reverse), run, None)


def _over_chunks(
    run: Callable[[Any, Any, int], Any], carry: Any, length: int, chunk: int, *, backwards: bool = False
) -> Any:
    """Runs all whole chunks in a loop, and the remaining steps as a shorter chunk."""
    whole, rest = divmod(length, chunk)
    if rest and backwards:
        carry = run(whole, carry, rest)
    carry = jax.lax.fori_loop(0, whole, lambda k, carry: run(whole - 1 - k if backwards else k, carry, chunk), carry)
    if rest and not backwards:
        carry = run(whole, carry, rest)
    return carry


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


class _Operand(NamedTuple):
    """An input and the letters of its axes: `b` the program's block of channels, `c` a chunk."""

    array: jax.Array
    axes: str


class _Array(NamedTuple):
    """An output: shape, dtype and the letters of its axes."""

    shape: tuple[int, ...]
    dtype: Any
    axes: str


_AXES: Final = {
    "u": "G B L E", "delta": "G B L E", "A": "G E N", "B": "G B L N", "C": "G B L N", "D": "G E", "delta_bias": "G E",
    "gap": "G B L", "order": "G B L", "z": "B L E",
}  # fmt: skip


def _padded_sizes(arguments: ScanArguments, channels: int) -> tuple[int, int]:
    """E and N filled up to whole blocks of channels and to a power of two of states."""
    _, _, width, states = arguments.sizes
    return -(-width // channels) * channels, power_of_two(states)


def _inputs(arguments: ScanArguments, z: jax.Array | None, width: int, states: int) -> dict[str, _Operand | None]:
    """The kernel's inputs, filled up with zeros to `width` and `states`; the models' own sizes need none."""
    whole, inputs = {"E": width, "N": states}, {}
    for name, array in {**arguments.for_kernels()._asdict(), "z": z}.items():
        sizes = {axis: whole[letter] for axis, letter in enumerate(_AXES[name].split()) if letter in whole}
        inputs[name] = None if array is None else _Operand(_resized(array, sizes), _AXES[name])
    return inputs


def _resized(array: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """Cuts some axes of an array to new sizes, or fills them up with zeros."""
    array = array[tuple(slice(sizes.get(axis)) for axis in range(array.ndim))]
    fill = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return jnp.pad(array, fill) if any(after for _, after in fill) else array


def _call(
    kernel: Callable[[Refs], None],
    inputs: dict[str, _Operand | None],
    outputs: dict[str, _Array | None],
    grid: tuple[int, int],
    channels: int,
    warps: int,
    interpret: bool,
) -> dict[str, Any]:
    """Runs `kernel` on a dict of refs, each limited to the program's image and block of channels; None has no ref."""
    given = {name: operand for name, operand in inputs.items() if operand is not None}
    asked = {name: array for name, array in outputs.items() if array is not None}
    for name, array in {**{name: operand.array for name, operand in given.items()}, **asked}.items():
        # Over a mesh this is traced for the whole batch, although each device runs only its part.
        symbolic = not all(isinstance(size, int) for size in array.shape)
        if not symbolic and math.prod(array.shape) > _LARGEST_INDEX * jax.device_count():
            raise InputError(
                f"{name} has shape {array.shape}, and the Pallas kernels index with 32 bits: split the batch, or use "
                "implementation='triton'."
            )
    names = (*given, *asked)
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid=grid,
        in_specs=[_spec(operand.array.shape, operand.axes, channels) for operand in given.values()],
        out_specs=[_spec(array.shape, array.axes, channels) for array in asked.values()],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in asked.values()],
        # Explicit, because the default is Mosaic, which is for TPUs and newer GPU kernels.
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="selective_scan",
    )(*(operand.array for operand in given.values()))
    return dict.fromkeys(outputs) | dict(zip(asked, results, strict=True))


def _spec(shape: tuple[int, ...], axes: str, channels: int) -> pl.BlockSpec:
    """The image and the block of channels that program (image, block) sees of an array."""
    letters = axes.split()
    cut = {"B": None, "b": None, "E": channels}
    return pl.BlockSpec(
        tuple(cut.get(letter, size) for letter, size in zip(letters, shape, strict=True)),
        lambda image, block: tuple({"B": image, "b": block, "E": block}.get(letter, 0) for letter in letters),
    )
