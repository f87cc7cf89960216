"""Launches the Triton kernels of `triton_kernels.py` from JAX, through jax-triton (the `cuda` extra)."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.optional import optional_package

from .blocks import Blocks, power_of_two
from .operands import ScanArguments, ScanGradients, ScanOutputs, ScanPlan

Array = Any  # a jax.Array, or a jax.ShapeDtypeStruct where only its shape and dtype matter


class KernelCall(NamedTuple):
    """Description of one launch; the tests also hand it to Triton's interpreter and to its compiler alone.

    Attributes:
        kernel: name of the function in `triton_kernels.py`.
        inputs: arrays, in the kernel's order; u replaces an absent array, which the kernel does not read.
        outputs: shapes and dtypes, in the kernel's order; one float replaces an output that is not written.
        constants: the kernel's compile-time arguments.
        grid: programs along (images, blocks of channels).
        warps: of each program.
    """

    kernel: str
    inputs: tuple[Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    grid: tuple[int, int]
    warps: int


def triton_forward(
    arguments: ScanArguments, z: Array | None, plan: ScanPlan, blocks: Blocks, *, save: bool
) -> ScanOutputs:
    """Runs the forward kernel; `save` keeps the chunk-start states for the backward."""
    out, _, starts, score = launch(forward_call(arguments.for_kernels(), z, plan, blocks, save=save))
    return ScanOutputs(out, score if plan.score else None, starts if save else None)


def triton_backward(
    arguments: ScanArguments, z: Array | None, starts: Array, dout: Array, plan: ScanPlan, blocks: Blocks
) -> ScanGradients:
    """Runs the backward kernel on the forward's arguments and states, and the cotangent of its `out`."""
    call = backward_call(arguments.for_kernels(), z, starts, dout, plan, blocks)
    du, ddelta, dA, dB, dC, dD, dbias, dz, _ = launch(call)
    return ScanGradients(du, ddelta, dA, dB, dC, dD, dbias, None if z is None else dz)


def forward_call(
    arguments: ScanArguments, z: Array | None, plan: ScanPlan, blocks: Blocks, *, save: bool
) -> KernelCall:
    """Describes the launch of the forward, on the result of `ScanArguments.for_kernels`."""
    batch, length, width, states = arguments.sizes
    directions = len(plan.reverse)
    programs = math.ceil(width / blocks.forward_channels)
    chunks = math.ceil(length / blocks.chunk)
    tokens = (batch, length, width)
    return KernelCall(
        kernel="forward_kernel",
        inputs=_inputs(arguments, z),
        outputs=(
            jax.ShapeDtypeStruct(tokens, arguments.u.dtype),
            _float32(directions > 1, *tokens),
            _float32(save, directions, batch, chunks, width, states),
            _float32(plan.score is not None, programs, batch, length),
        ),
        constants={
            **_constants(arguments, z, plan, blocks.chunk, blocks.forward_channels),
            "score_kind": plan.score or "none",
            "save": save,
        },
        grid=(batch, programs),
        warps=blocks.forward_warps,
    )


def backward_call(
    arguments: ScanArguments, z: Array | None, starts: Array, dout: Array, plan: ScanPlan, blocks: Blocks
) -> KernelCall:
    """Describes the launch of the backward, on the result of `ScanArguments.for_kernels`."""
    batch, length, width, states = arguments.sizes
    directions = len(plan.reverse)
    programs = math.ceil(width / blocks.backward_channels)
    tokens = (batch, length, width)
    return KernelCall(
        kernel="backward_kernel",
        inputs=(*_inputs(arguments, z), starts, dout),
        outputs=(
            jax.ShapeDtypeStruct((directions, *tokens), arguments.u.dtype),
            jax.ShapeDtypeStruct((directions, *tokens), arguments.delta.dtype),
            _float32(True, directions, batch, width, states),
            _float32(True, programs, directions, batch, length, states),
            _float32(True, programs, directions, batch, length, states),
            _float32(True, directions, batch, width),
            _float32(True, directions, batch, width),
            jax.ShapeDtypeStruct(tokens, z.dtype) if z is not None else _float32(False),
            _float32(z is not None and directions > 1, *tokens),
        ),
        constants=_constants(arguments, z, plan, blocks.chunk, blocks.backward_channels),
        grid=(batch, programs),
        warps=blocks.backward_warps,
    )


def launch(call: KernelCall) -> tuple[jax.Array, ...]:
    """Launches through jax-triton.

    Raises:
        InputError: jax-triton is not installed.
    """
    jax_triton = optional_package("jax_triton", purpose="implementation='triton'", install="'top-jax[cuda]'")

    from . import triton_kernels

    # The two supported releases name the same options differently. FP fusion is set explicitly because Triton's
    # default changes in 3.10.
    if int(importlib.metadata.version("jax-triton").split(".")[1]) < 4:
        named: dict[str, Any] = {"out_shape": call.outputs, "enable_fp_fusion": True}
    else:
        named = {"out_type": call.outputs, "backend_options": {"enable_fp_fusion": True}}
    return jax_triton.triton_call(
        *call.inputs,
        kernel=getattr(triton_kernels, call.kernel),
        grid=call.grid,
        num_warps=call.warps,
        num_stages=1,
        name=f"selective_scan_{call.kernel}",
        **named,
        **call.constants,
    )


def _inputs(arguments: ScanArguments, z: Array | None) -> tuple[Array, ...]:
    order = (*arguments[: arguments._fields.index("gap")], z, arguments.gap, arguments.order)
    return tuple(arguments.u if array is None else array for array in order)


def _constants(arguments: ScanArguments, z: Array | None, plan: ScanPlan, chunk: int, channels: int) -> dict[str, Any]:
    batch, length, width, states = arguments.sizes
    directions = len(plan.reverse)
    return {
        "batch": batch,
        "length": length,
        "width": width,
        "states": states,
        "directions": directions,
        "reverse": sum(backwards << g for g, backwards in enumerate(plan.reverse)),
        "u_shared": len(arguments.u) < directions,
        "delta_shared": len(arguments.delta) < directions,
        "has_z": z is not None,
        "has_gap": arguments.gap is not None,
        "has_order": arguments.order is not None,
        "reorder_parameters": plan.reorder_parameters,
        "chunk": chunk,
        "block_e": channels,
        "block_n": power_of_two(states),
    }


def _float32(used: bool, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape if used else (1,), jnp.float32)
