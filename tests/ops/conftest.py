"""Inputs and comparisons for every test of the scan."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import EXACT, OPTIMISED, QUICK

from top_jax.kernels import triton_scan
from top_jax.ops import implementations, selective_scan

Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def interpreted_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of `triton_interpreter` runs the implementation `triton`, its launches by Triton's interpreter."""
    if "triton_interpreter" in getattr(request.node, "callspec", SimpleNamespace(params={})).params.values():
        if implementations.device().platform == "gpu":
            pytest.skip("the interpreter cannot share a process with the real Triton, which runs here")
        monkeypatch.setattr(triton_scan, "launch", _interpret)
        monkeypatch.setattr(implementations, "obstacle", lambda name: None)


def _interpret(call: triton_scan.KernelCall) -> tuple[jax.Array, ...]:
    """Stands in for `triton_scan.launch` on a machine without a GPU."""
    kernel = getattr(_interpreted_kernels(), call.kernel)

    def run(*inputs: Any) -> tuple[np.ndarray, ...]:
        # Poisoned: what the kernel does not write is seen.
        outputs = [np.full(like.shape, np.nan, like.dtype) for like in call.outputs]
        tensors = [_as_torch(np.array(array)) for array in inputs], [_as_torch(array) for array in outputs]
        with np.errstate(over="ignore"):  # 1 / (1 + infinity) is the sigmoid of -1e4
            kernel[call.grid](*tensors[0], *tensors[1], **call.constants)
        return tuple(outputs)

    return tuple(jax.pure_callback(run, call.outputs, *call.inputs))


@functools.cache
def _interpreted_kernels() -> Any:
    # By path, past the run-time type checks of the tests: Triton reads the source of what it decorates.
    spec = importlib.util.spec_from_file_location(
        "interpreted_kernels", triton_scan.__file__.replace("scan", "kernels")
    )
    assert spec is not None and spec.loader is not None
    _let_scalars_be_indices()
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


def _let_scalars_be_indices() -> None:
    """Triton 3.6's interpreter makes the bounds of a range by int(array of one element), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_again(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_again


def _as_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype == jnp.bfloat16:  # which NumPy lends to no one
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    def make(batch: int, length: int, width: int, states: int, *, dtype: str = "float32", without=(), seed: int = 0):
        rng = np.random.default_rng((seed, batch, length, width, states))
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        tokens = {"u": (batch, length, width), "delta": (batch, length, width), "z": (batch, length, width)}
        tokens |= {"B": (batch, length, states), "C": (batch, length, states)}
        inputs = {name: draw(*shape).astype(jnp.dtype(dtype)) for name, shape in tokens.items()}
        inputs |= {"A": -np.exp(draw(width, states)), "D": draw(width), "delta_bias": draw(width)}
        return {name: jax.device_put(array) for name, array in inputs.items() if name not in without}

    return make


@pytest.fixture(scope="session")
def make_positions() -> Callable[..., jax.Array]:
    """Strictly increasing int32 [B, L], with gaps of 0 to 3 that differ per image."""

    def make(batch: int, length: int, seed: int = 0) -> jax.Array:
        steps = np.random.default_rng((seed, batch, length)).integers(1, 5, size=(batch, length))
        return jnp.asarray(np.cumsum(steps, axis=1) - 1, jnp.int32)

    return make


@functools.cache
def _compiled(
    level: str, name: str, options: tuple[tuple[str, Any], ...], *, gradients: bool = True
) -> Callable[..., Any]:
    implementation = "triton" if name == "triton_interpreter" else name

    def scan(inputs: Inputs, positions: Any) -> jax.Array:
        return selective_scan(**inputs, positions=positions, implementation=implementation, **dict(options))

    def loss(inputs: Inputs, cotangent: jax.Array, positions: Any):
        out = scan(inputs, positions)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    options_of = {"quick": QUICK, "exact": EXACT, "optimised": OPTIMISED}
    wanted = jax.value_and_grad(loss, has_aux=True) if gradients else scan
    return jax.jit(wanted, compiler_options=options_of[level])


@pytest.fixture(scope="session")
def run_scan() -> Callable[..., tuple[jax.Array, Inputs]]:
    """(output, gradients of sum(output * cotangent) by input), from one program."""

    def run(
        inputs: Inputs,
        cotangent: Any = None,
        *,
        implementation: str,
        level: str = "quick",
        positions: Any = None,
        **options: Any,
    ):
        if cotangent is None:
            shape = inputs["u"].shape
            cotangent = jax.device_put(np.random.default_rng(7).normal(size=shape).astype(np.float32))
        graded = _compiled(level, implementation, _all_options(options))
        (_, out), grads = graded(inputs, jnp.asarray(cotangent), positions)
        return out, grads

    return run


@pytest.fixture(scope="session")
def scan_forward() -> Callable[..., jax.Array]:
    """The output of `run_scan` from a program of its own, which has no gradients to compile."""

    def run(inputs: Inputs, *, implementation: str, positions: Any = None, **options: Any) -> jax.Array:
        return _compiled("quick", implementation, _all_options(options), gradients=False)(inputs, positions)

    return run


def _all_options(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns the options with their defaults, sorted, so that equal calls share a program."""
    return tuple(sorted({"alignment": "none", "reverse": False, **options}.items()))
