"""Launches the Triton kernels of `triton_kernels.py` from JAX, through jax-triton (the `cuda` extra)."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.optional import optional_package

from .blocks import Blocks, power_of_two
from .operands import ScanArguments, ScanGradients, ScanOutputs, ScanPlan

_THREADS: Final = 32  # per warp
_PART: Final = 4  # PART in triton_kernels.py
_BACKWARD: Final = (4, 1)  # CHUNK in triton_kernels.py, and the warps of its backward
_MOST_CHANNELS_OF_A_THREAD: Final = 2  # in the forward pass
_MOST_STATES_AHEAD: Final = 32  # per thread, so that the next B and C still fit into its registers

Array = Any  # a jax.Array, or a jax.ShapeDtypeStruct where only its shape and dtype matter


class KernelCall(NamedTuple):
    """Description of one launch; the tests also hand it to Triton's interpreter and to its compiler alone.

    Attributes:
        kernel: name of the function in `triton_kernels.py`.
        inputs: arrays, in the kernel's order; u replaces an absent array, which the kernel does not read.
        outputs: shapes and dtypes, in the kernel's order; one float replaces an output that is not written.
        constants: the kernel's compile-time arguments.
        grid: programs along (directions of each image, blocks of channels).
        warps: of each program.
    """

    kernel: str
    inputs: tuple[Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    grid: tuple[int, int]
    warps: int


def triton_forward(arguments: ScanArguments, plan: ScanPlan, blocks: Blocks, *, save: bool) -> ScanOutputs:
    """Runs the forward kernel; `save` keeps the states at the start of each segment for the backward."""
    y, starts = launch(forward_call(arguments.for_kernels(), plan, blocks, save=save))
    return ScanOutputs(y, starts if save else None)


def triton_backward(
    arguments: ScanArguments, starts: Array, dout: Array, plan: ScanPlan, blocks: Blocks
) -> ScanGradients:
    """Runs the backward kernel on the forward's arguments and states, and the cotangent of the sum of its y."""
    *gradients, _ = launch(backward_call(arguments.for_kernels(), starts, dout, plan, blocks))
    return ScanGradients(*gradients)


def forward_call(arguments: ScanArguments, plan: ScanPlan, blocks: Blocks, *, save: bool) -> KernelCall:
    """Describes the launch of the forward, on the result of `ScanArguments.for_kernels`."""
    batch, length, width, _ = arguments.sizes
    channels, warps, segments = blocks.forward_channels, blocks.forward_warps, math.ceil(length / blocks.segment)
    constants = _constants(arguments, plan, blocks.segment, channels)
    of_a_thread = min(max(channels // (_THREADS * warps), 1), _MOST_CHANNELS_OF_A_THREAD)
    return KernelCall(
        kernel="forward_kernel",
        inputs=_inputs(arguments),
        outputs=(
            jax.ShapeDtypeStruct((len(plan.reverse), batch, length, width), arguments.u.dtype),
            _float32(save, len(plan.reverse), batch, segments, constants["block_n"] // _PART, width, _PART),
        ),
        constants={
            **constants,
            "save": save,
            "chunk": min(blocks.forward_chunk, length),
            "pair": of_a_thread,
            "ahead": constants["block_n"] * of_a_thread <= _MOST_STATES_AHEAD,
        },
        grid=(len(plan.reverse) * batch, math.ceil(width / channels)),
        warps=warps,
    )


def backward_call(arguments: ScanArguments, starts: Array, dout: Array, plan: ScanPlan, blocks: Blocks) -> KernelCall:
    """Describes the launch of the backward, on the result of `ScanArguments.for_kernels`.

    Raises:
        InputError: the blocks are not for this kernel.
    """
    batch, length, width, states = arguments.sizes
    directions, channels = len(plan.reverse), blocks.backward_channels
    if (blocks.backward_chunk, blocks.backward_warps) != _BACKWARD or channels < _THREADS // _BACKWARD[0]:
        raise InputError(f"{blocks}: the Triton backward needs backward_chunk=4, backward_warps=1, 8 channels or more.")
    programs, chunks = math.ceil(width / channels), blocks.segment // blocks.backward_chunk
    constants = _constants(arguments, plan, blocks.segment, channels)
    return KernelCall(
        kernel="backward_kernel",
        inputs=(*_inputs(arguments), starts, dout),
        outputs=(
            jax.ShapeDtypeStruct((directions, batch, length, width), arguments.u.dtype),
            jax.ShapeDtypeStruct((directions, batch, length, width), arguments.delta.dtype),
            _float32(True, directions, batch, width, states),
            *2 * (_float32(True, programs, directions, batch, length, states),),
            *2 * (_float32(True, directions, batch, width),),
            _float32(chunks > 1, directions, batch, programs, chunks, channels * constants["block_n"]),
        ),
        constants=constants,
        grid=(directions * batch, programs),
        warps=blocks.backward_warps,
    )


def launch(call: KernelCall) -> tuple[jax.Array, ...]:
    """Launches through jax-triton.

    Raises:
        InputError: jax-triton is not installed.
    """
    jax_triton = optional_package("jax_triton", purpose="implementation='triton'")

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


def _inputs(arguments: ScanArguments) -> tuple[Array, ...]:
    return tuple(arguments.u if array is None else array for array in arguments)


def _constants(arguments: ScanArguments, plan: ScanPlan, segment: int, channels: int) -> dict[str, Any]:
    batch, length, width, states = arguments.sizes
    directions = len(plan.reverse)
    return {
        "batch": batch, "length": length, "width": width, "states": states, "directions": directions,
        "reverse": sum(backwards << g for g, backwards in enumerate(plan.reverse)),
        "u_shared": len(arguments.u) < directions, "delta_shared": len(arguments.delta) < directions,
        "has_gap": arguments.gap is not None, "has_order": arguments.order is not None,
        "reorder_parameters": plan.reorder_parameters, "segment": segment, "block_e": channels,
        "block_n": max(power_of_two(states), _PART),
    }  # fmt: skip


def _float32(used: bool, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape if used else (1,), jnp.float32)
