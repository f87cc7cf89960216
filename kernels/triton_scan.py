"""Launches the Triton kernels of `triton_kernels.py` from JAX, through jax-triton (the `cuda` extra)."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .blocks import Blocks, power_of_two
from .operands import Array, ScanGradients, ScanOperands, ScanOutputs, ScanPlan


class KernelCall(NamedTuple):
    """One launch, described; also what the interpreter and the compiler alone are given in the tests.

    Attributes:
        kernel: name of the function in `triton_kernels.py`.
        inputs: arrays, in the kernel's order; u stands in for what is absent and not read.
        outputs: shapes and dtypes, in the kernel's order; one float stands in for what is not written.
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


def triton_forward(operands: ScanOperands, plan: ScanPlan, blocks: Blocks, *, save: bool) -> ScanOutputs:
    """Runs the forward kernel; `save` keeps the chunk-start states for the backward."""
    out, _, starts, score = launch(forward_call(operands.for_kernels(), plan, blocks, save=save))
    return ScanOutputs(out, score if plan.score else None, starts if save else None)


def triton_backward(
    operands: ScanOperands, starts: jax.Array, dout: jax.Array, plan: ScanPlan, blocks: Blocks
) -> ScanGradients:
    """Runs the backward kernel on the forward's operands and states, and the cotangent of its `out`."""
    call = backward_call(operands.for_kernels(), starts, dout, plan, blocks)
    du, ddelta, dA, dB, dC, dD, dbias, dz, _ = launch(call)
    return ScanGradients(du, ddelta, dA, dB, dC, dD, dbias, None if operands.z is None else dz)


def forward_call(operands: ScanOperands, plan: ScanPlan, blocks: Blocks, *, save: bool) -> KernelCall:
    """Describes the launch of the forward, on operands as `ScanOperands.for_kernels` gives them."""
    directions, batch, length, width, states = operands.sizes
    programs = math.ceil(width / blocks.forward_channels)
    chunks = math.ceil(length / blocks.chunk)
    tokens = (batch, length, width)
    return KernelCall(
        kernel="forward_kernel",
        inputs=_inputs(operands),
        outputs=(
            jax.ShapeDtypeStruct(tokens, operands.u.dtype),
            _float32(directions > 1, *tokens),
            _float32(save, directions, batch, chunks, width, states),
            _float32(plan.score is not None, programs, batch, length),
        ),
        constants={
            **_constants(operands, plan, blocks.chunk, blocks.forward_channels),
            "score_kind": plan.score or "none",
            "save": save,
        },
        grid=(batch, programs),
        warps=blocks.forward_warps,
    )


def backward_call(operands: ScanOperands, starts: Array, dout: Array, plan: ScanPlan, blocks: Blocks) -> KernelCall:
    """Describes the launch of the backward, on operands as `ScanOperands.for_kernels` gives them."""
    directions, batch, length, width, states = operands.sizes
    programs = math.ceil(width / blocks.backward_channels)
    tokens, gated = (batch, length, width), operands.z is not None
    return KernelCall(
        kernel="backward_kernel",
        inputs=(*_inputs(operands), starts, dout),
        outputs=(
            jax.ShapeDtypeStruct((directions, *tokens), operands.u.dtype),
            jax.ShapeDtypeStruct((directions, *tokens), operands.delta.dtype),
            _float32(True, directions, batch, width, states),
            _float32(True, programs, directions, batch, length, states),
            _float32(True, programs, directions, batch, length, states),
            _float32(True, directions, batch, width),
            _float32(True, directions, batch, width),
            jax.ShapeDtypeStruct(tokens, operands.z.dtype) if operands.z is not None else _float32(False),
            _float32(gated and directions > 1, *tokens),
        ),
        constants=_constants(operands, plan, blocks.chunk, blocks.backward_channels),
        grid=(batch, programs),
        warps=blocks.backward_warps,
    )


def launch(call: KernelCall) -> tuple[jax.Array, ...]:
    """Launches through jax-triton. ImportError without it."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    from . import triton_kernels

    # The two releases we support name the same things differently. FP fusion is asked for by name: Triton's default
    # changes in 3.10.
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


def _inputs(operands: ScanOperands) -> tuple[Array, ...]:
    return tuple(operands.u if array is None else array for array in operands)


def _constants(operands: ScanOperands, plan: ScanPlan, chunk: int, channels: int) -> dict[str, Any]:
    directions, batch, length, width, states = operands.sizes
    return {
        "batch": batch,
        "length": length,
        "width": width,
        "states": states,
        "directions": directions,
        "reverse": sum(backwards << g for g, backwards in enumerate(plan.reverse)),
        "u_shared": len(operands.u) < directions,
        "delta_shared": len(operands.delta) < directions,
        "has_z": operands.z is not None,
        "has_gap": operands.gap is not None,
        "has_order": operands.order is not None,
        "reorder_parameters": plan.reorder_parameters,
        "chunk": chunk,
        "block_e": channels,
        "block_n": power_of_two(states),
    }


def _float32(used: bool, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape if used else (1,), jnp.float32)
