"""Without a GPU: jax-triton traces and lowers both Triton kernels for CUDA, as far as the launch itself.

jax-triton needs JAX's CUDA plugin (a wheel of its own: `pip install --no-deps jax-cuda12-plugin`), not a GPU. This file
is also the program that the test starts, apart from the processes in which Triton interprets.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.triton
def test_lowers_through_jax_triton(request: pytest.FixtureRequest):
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if importlib.util.find_spec("jax_triton") is None or not any(map(importlib.util.find_spec, plugins)):
        pytest.skip("needs jax-triton and JAX's CUDA plugin")
    root = str(request.config.rootpath)
    environment = {**os.environ, "PYTHONPATH": root, "TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["None", "forward", "1", "backward", "1"]


def main() -> None:
    """Prints what `auto` would hold against jax-triton, and the custom calls in each lowered pass."""
    import jax
    import jax_triton

    from tools.triton_resources import SHAPES, operands_of, plan_of
    from top_jax.kernels.blocks import by_rule
    from top_jax.kernels.triton_scan import forward_call, triton_backward, triton_forward
    from top_jax.ops.implementations import problem_with_jax_triton

    # Otherwise it is asked of the GPU that is not there.
    jax_triton.triton_call = functools.partial(jax_triton.triton_call, compute_capability=90)
    print(problem_with_jax_triton())
    shape = SHAPES[-1]._replace(length=19, width=96)
    arguments, plan, blocks = operands_of(shape, "bfloat16", 2), plan_of(shape), by_rule("triton", 96, 16)
    starts = forward_call(arguments, plan, blocks, save=True).outputs[-1]
    dout = jax.ShapeDtypeStruct(arguments.u.shape[1:], "bfloat16")
    forward = functools.partial(triton_forward, plan=plan, blocks=blocks, save=True)
    backward = functools.partial(triton_backward, plan=plan, blocks=blocks)
    passes = {"forward": (forward, arguments), "backward": (backward, arguments, starts, dout)}
    for name, (pass_, *given) in passes.items():
        program = jax.jit(pass_).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        print(name, program.count("custom_call @triton_kernel_call"))


if __name__ == "__main__":
    main()
