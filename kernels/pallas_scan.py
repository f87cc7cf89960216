"""The aligned selective scan as Pallas kernels: for a GPU with JAX alone, and for any machine in interpret mode.

The algorithm is that of `triton_kernels.py` (docs/concepts/kernels.md): one program per direction, image and block of
channels, with the state in registers. The state at the start of every chunk is saved. No masks are needed: channels and
states are padded to whole blocks, and the last steps, which do not fill a chunk, are a shorter chunk.

Letters: i index in the scan's own order, step = i counted from the front of the image, token = the row that step
visits, row = the row its delta, B and C are read from.
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
from .operands import ScanArguments, ScanGradients, ScanOutputs, ScanPlan

LN_2 = 0.6931471805599453
_LARGEST_INDEX = 2**31 - 1


def pallas_forward(
    arguments: ScanArguments, plan: ScanPlan, blocks: Blocks, *, save: bool, interpret: bool = False
) -> ScanOutputs:
    """Runs the forward kernel; `save` keeps the chunk-start states for the backward."""
    sizes = _padded_sizes(arguments, plan, blocks, blocks.forward_channels)
    outputs = {"y": (arguments.u.dtype, "G B L E"), **({"starts": (jnp.float32, "G B c E N")} if save else {})}
    kernel = functools.partial(_forward_kernel, plan, blocks.segment)
    results = _call(
        kernel, _inputs(arguments, sizes), outputs, sizes, blocks.forward_channels, blocks.forward_warps, interpret
    )
    return ScanOutputs(results["y"][..., : arguments.sizes[2]], results.get("starts"))


def pallas_backward(
    arguments: ScanArguments, starts: Any, dout: Any, plan: ScanPlan, blocks: Blocks, *, interpret: bool = False
) -> ScanGradients:
    """Runs the backward kernel on the forward's arguments and states, and the cotangent of the sum of its y."""
    sizes = _padded_sizes(arguments, plan, blocks, blocks.backward_channels)
    inputs = _inputs(arguments, sizes)
    inputs |= {"starts": _operand(starts, "G B c E N", sizes), "dout": _operand(dout, "B L E", sizes)}
    outputs = {
        "du": (arguments.u.dtype, "G B L E"), "ddelta": (arguments.delta.dtype, "G B L E"),
        "dA": (jnp.float32, "G B E N"), "dB": (jnp.float32, "b G B L N"), "dC": (jnp.float32, "b G B L N"),
        "dD": (jnp.float32, "G B E"), "dbias": (jnp.float32, "G B E"),
    }  # fmt: skip
    kernel = functools.partial(_backward_kernel, plan, blocks.segment)
    grads = _call(kernel, inputs, outputs, sizes, blocks.backward_channels, blocks.backward_warps, interpret)
    real = dict(zip("BLEN", arguments.sizes, strict=True))
    return ScanGradients(*(_operand(grads[name], axes, real).array for name, (_, axes) in outputs.items()))


Refs = dict[str, Any]
Row = dict[str, Any]  # arrays and their indices, int or traced


def _forward_kernel(plan: ScanPlan, chunk: int, refs: Refs) -> None:
    a, skip, bias, route = refs["A"][...], refs["D"][...], refs["delta_bias"][...], _route(plan, refs["y"].shape[0])

    def run(c: Any, carry: tuple[jax.Array, jax.Array], steps: int) -> tuple[jax.Array, jax.Array]:
        h, dt_before = carry
        if "starts" in refs:
            refs["starts"][c] = h
        rows = [_load(refs, plan, route, c * chunk + s, ("u", "delta", "B", "C")) for s in range(steps)]
        for row in rows:
            dt = _softplus(row["delta"] + bias)
            tau = dt + row["gap"] * dt_before if "gap" in refs else dt
            dt_before = dt
            h = jnp.exp2(tau[:, None] * a) * h + (dt * row["u"])[:, None] * row["B"][None, :]
            y = jnp.sum(h * row["C"][None, :], axis=1) + skip * row["u"]
            refs["y"][row["token"]] = y.astype(refs["y"].dtype)
        return h, dt_before

    start = (jnp.zeros(a.shape, jnp.float32), jnp.zeros(a.shape[:1], jnp.float32))
    _over_chunks(run, start, refs["y"].shape[0], chunk)


class _Adjoint(NamedTuple):
    """Values that the backward carries from step to step."""

    h: jax.Array  # [E block, N], cotangent of the state
    A: jax.Array  # [E block, N]
    D: jax.Array  # [E block]
    delta_bias: jax.Array  # [E block]
    from_gap: jax.Array  # [E block], gradient of dt through the gap after its token


def _backward_kernel(plan: ScanPlan, chunk: int, refs: Refs) -> None:
    a, bias, route = refs["A"][...], refs["delta_bias"][...], _route(plan, refs["dout"].shape[0])

    def run(c: Any, adjoint: _Adjoint, steps: int) -> _Adjoint:
        rows = [_load(refs, plan, route, c * chunk + s, ("u", "delta", "B", "C", "dout")) for s in range(steps)]
        h, dt_before = refs["starts"][c], jnp.zeros_like(bias)
        if "gap" in refs:
            before = _load(refs, plan, route, jnp.maximum(c * chunk - 1, 0), ("delta",))
            dt_before = jnp.where(c > 0, _softplus(before["delta"] + bias), 0.0)
        for row in rows:
            row["dt"] = dt = _softplus(row["delta"] + bias)
            row["tau"] = dt + row["gap"] * dt_before if "gap" in refs else dt
            dt_before = dt
            row["before"] = h
            row["h"] = h = jnp.exp2(row["tau"][:, None] * a) * h + (dt * row["u"])[:, None] * row["B"][None, :]
        for row in reversed(rows):
            adjoint = _pull_back(refs, row, adjoint, a, bias)
        return adjoint

    matrix, vector = jnp.zeros(a.shape, jnp.float32), jnp.zeros(a.shape[:1], jnp.float32)
    start = _Adjoint(matrix, matrix, vector, vector, vector)
    end = _over_chunks(run, start, refs["dout"].shape[0], chunk, backwards=True)
    refs["dA"][...], refs["dD"][...], refs["dbias"][...] = end.A, end.D, end.delta_bias


def _pull_back(refs: Refs, row: Row, adjoint: _Adjoint, a: jax.Array, bias: jax.Array) -> _Adjoint:
    """Runs one step of the backward, which docs/concepts/kernels.md derives."""
    x, dy, dt, tau = row["u"], row["dout"], row["dt"], row["tau"]
    dh = adjoint.h + dy[:, None] * row["C"][None, :]
    refs["dC"][row["row"]] = jnp.sum(row["h"] * dy[:, None], axis=0)
    refs["dB"][row["row"]] = jnp.sum(dh * (dt * x)[:, None], axis=0)
    ddrive = jnp.sum(dh * row["B"][None, :], axis=1)
    dh = dh * jnp.exp2(tau[:, None] * a)
    dexponent = dh * row["before"]
    dtau = jnp.sum(dexponent * a, axis=1) * LN_2  # a is log2(e) A
    draw = (ddrive * x + dtau + adjoint.from_gap) * jax.nn.sigmoid(row["delta"] + bias)
    refs["du"][row["token"]] = (ddrive * dt + refs["D"][...] * dy).astype(refs["du"].dtype)
    refs["ddelta"][row["row"]] = draw.astype(refs["ddelta"].dtype)
    from_gap = row["gap"] * dtau if "gap" in refs else adjoint.from_gap
    return _Adjoint(dh, adjoint.A + dexponent * tau[:, None], adjoint.D + dy * x, adjoint.delta_bias + draw, from_gap)


def _load(refs: Refs, plan: ScanPlan, route: tuple[Any, Any], i: Any, names: tuple[str, ...]) -> Row:
    """Loads the float32 rows `[E block]` or `[N]` of scan index i, with its token and row."""
    step = route[0] + route[1] * i
    token = refs["order"][step] if "order" in refs else step
    row: Row = {"token": token, "row": token if plan.reorder_parameters else step}
    for name in names:
        row[name] = refs[name][token if name in ("u", "dout") else row["row"]].astype(jnp.float32)
    if "gap" in refs:
        row["gap"] = refs["gap"][step]
    return row


def _route(plan: ScanPlan, length: int) -> tuple[Any, Any]:
    """Returns the first step of this program's direction, and the increment to the next: 1 or -1."""
    if len(set(plan.reverse)) == 1:
        return (length - 1, -1) if plan.reverse[0] else (0, 1)
    backwards = sum(bit << g for g, bit in enumerate(plan.reverse)) >> pl.program_id(0) & 1
    return backwards * (length - 1), 1 - 2 * backwards


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


class _Operand(NamedTuple):
    """An array, or its shape and dtype, and the letters of its axes: `b` a block of channels, `c` a chunk."""

    array: Any
    axes: str


_AXES: Final = {
    "u": "G B L E", "delta": "G B L E", "A": "G E N", "B": "G B L N", "C": "G B L N", "D": "G E", "delta_bias": "G E",
    "gap": "G B L", "order": "G B L",
}  # fmt: skip


def _padded_sizes(arguments: ScanArguments, plan: ScanPlan, blocks: Blocks, channels: int) -> dict[str, int]:
    """Returns the size of each letter; E is padded to whole blocks of channels, and N to a power of two."""
    if not blocks.segment == blocks.forward_chunk == blocks.backward_chunk:
        raise InputError(
            f"blocks came with segment={blocks.segment}, forward_chunk={blocks.forward_chunk} and "
            f"backward_chunk={blocks.backward_chunk}; the Pallas kernels save every chunk: give three equal numbers."
        )
    batch, length, width, states = arguments.sizes
    programs = -(-width // channels)
    sizes = {"G": len(plan.reverse), "B": batch, "L": length, "c": -(-length // blocks.segment), "b": programs}
    return sizes | {"E": programs * channels, "N": power_of_two(states)}


def _inputs(arguments: ScanArguments, sizes: dict[str, int]) -> dict[str, _Operand]:
    given = {name: array for name, array in arguments.for_kernels()._asdict().items() if array is not None}
    return {name: _operand(array, _AXES[name], sizes) for name, array in given.items()}


def _operand(array: jax.Array, axes: str, sizes: dict[str, int]) -> _Operand:
    """Crops or zero-pads an array to the padded E and N; the named models' arrays already have these sizes."""
    new = [sizes[letter] if letter in "EN" else size for letter, size in zip(axes.split(), array.shape, strict=True)]
    array = array[tuple(map(slice, new))]
    fill = [(0, size - now) for size, now in zip(new, array.shape, strict=True)]
    return _Operand(jnp.pad(array, fill) if any(after for _, after in fill) else array, axes)


def _call(
    kernel: Callable[[Refs], None],
    inputs: dict[str, _Operand],
    outputs: dict[str, tuple[Any, str]],
    sizes: dict[str, int],
    channels: int,
    warps: int,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs `kernel` on a dict of refs, each limited to the program's own part; outputs are given as (dtype, axes)."""
    asked = {
        name: _Operand(jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in axes.split()), dtype), axes)
        for name, (dtype, axes) in outputs.items()
    }
    for name, (array, _) in {**inputs, **asked}.items():
        # Over a mesh this is traced for the whole batch, although each device runs only its part.
        symbolic = not all(isinstance(size, int) for size in array.shape)
        if not symbolic and math.prod(array.shape) > _LARGEST_INDEX * jax.device_count():
            raise InputError(
                f"{name} has shape {array.shape}, and the Pallas kernels index with 32 bits: split the batch, or use "
                "implementation='triton'."
            )
    names = (*inputs, *asked)
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid=(sizes["G"], sizes["B"], sizes["b"]),
        in_specs=[_spec(array.shape, axes, channels) for array, axes in inputs.values()],
        out_specs=[_spec(array.shape, axes, channels) for array, axes in asked.values()],
        out_shape=[array for array, _ in asked.values()],
        # Explicit, because the default is Mosaic, which is for TPUs and newer GPU kernels.
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="selective_scan",
    )(*(array for array, _ in inputs.values()))
    return dict(zip(asked, results, strict=True))


def _spec(shape: tuple[int, ...], axes: str, channels: int) -> pl.BlockSpec:
    """Returns the part of an array that program (g, image, block) sees: its direction, image and channels."""
    letters = axes.split()
    cut = {"G": None, "B": None, "b": None, "E": channels}
    shared = letters[0] == "G" and shape[0] == 1
    return pl.BlockSpec(
        tuple(cut.get(letter, size) for letter, size in zip(letters, shape, strict=True)),
        lambda g, image, block: tuple(
            {"G": 0 if shared else g, "B": image, "b": block, "E": block}.get(letter, 0) for letter in letters
        ),
    )
