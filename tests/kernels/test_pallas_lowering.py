"""Without a GPU: the Pallas kernels lower for CUDA, and the program that would run there holds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tools.triton_resources import Shape, operands_of
from top_jax.errors import InputError
from top_jax.kernels.blocks import Blocks, by_rule
from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.kernels.pallas_scan import pallas_backward, pallas_forward


def lowered_for_cuda(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """The jaxpr and the StableHLO."""
    gpu = AbstractDevice("NVIDIA H200", num_cores=None, platform="gpu")  # JAX 0.11 and later want to know
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(function).trace(*arguments)
        return str(traced.jaxpr), traced.lower(lowering_platforms=("cuda",)).as_text()


def operands(directions: int, dtype: str, *, full: bool, length=19, width=96, states=16) -> ScanArguments:
    """Shapes of the arguments of a scan of two images; `full` has gaps and an order, as PlainMamba's."""
    return operands_of(Shape("", length, width, states, directions, full, full), dtype, batch=2)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # JAX 0.12; docs/concepts/kernels.md
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("directions, full", [(1, False), (4, True)])
def test_lowers_for_cuda(directions, full, dtype):
    given = operands(directions, dtype, full=full)
    plan = ScanPlan((False, True, False, True)[:directions], reorder_parameters=False)
    blocks = by_rule("pallas", 96, 16)
    forward = functools.partial(pallas_forward, plan=plan, blocks=blocks, save=True)
    backward = functools.partial(pallas_backward, plan=plan, blocks=blocks)
    states = jax.eval_shape(functools.partial(forward, interpret=True), given).starts
    dout = jax.ShapeDtypeStruct(given.u.shape[1:], dtype)
    for pass_, arguments in ((forward, (given,)), (backward, (given, states, dout))):
        jaxpr, program = lowered_for_cuda(pass_, *arguments)
        assert jaxpr.count("pallas_call") == 1
        assert program.count("__gpu$xla.gpu.triton") == 1 or program.count("triton_kernel_call") == 1


def test_odd_sizes_are_filled_up_and_cut_again():
    given = jax.tree.map(
        lambda a: jax.device_put(np.random.default_rng(0).normal(size=a.shape).astype(a.dtype)),
        operands(1, "float32", full=False, length=7, width=5, states=3),
    )
    one = lambda channels: pallas_forward(  # noqa: E731
        given, ScanPlan((False,)), Blocks(4, 4, channels, 1, 4, channels, 1), save=False, interpret=True
    )
    whole, cut = one(8), one(2)
    assert whole.y.shape == cut.y.shape == (1, 2, 7, 5)
    np.testing.assert_allclose(whole.y, cut.y, rtol=1e-6, atol=1e-6)


def test_every_chunk_is_saved():
    given = operands(1, "float32", full=False)
    with pytest.raises(InputError, match="segment=8, forward_chunk=4 and backward_chunk=4"):
        pallas_forward(given, ScanPlan((False,)), Blocks(8, 4, 32, 1, 4, 32, 1), save=False)
