"""The Pallas kernels' code for XLA compiles for sm_90 without a GPU, and nothing spills.

XLA would compile it with its own copy of Triton; here Triton's package does, from the same code. This file is also the
program that the test starts, outside the processes in which Triton interprets.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.triton
def test_compiles_without_spills(root, capsys):
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    with capsys.disabled():
        print(f"\n{run.stdout}")
    assert len(rows) == 6
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert 0 < row["registers"] <= 255 and row["exponentials"] >= 16, row


def handed_to_xla(function: Any, *arguments: Any) -> str:
    """The Triton program inside a function lowered for CUDA, as text."""
    import jax
    from jax._src.lib import triton as triton_dialect
    from jax._src.lib.mlir import ir
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    gpu = AbstractDevice("NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir()
    target = '"__gpu$xla.gpu.triton"'
    (call,) = [op for op in operations(module.operation) if str(dict(op.attributes).get("call_target_name")) == target]
    settings = {entry.name: entry.attr for entry in ir.DictAttr(call.attributes["mhlo.backend_config"])}
    context = ir.Context()
    context.allow_unregistered_dialects = True  # of the barrier, which Triton knows
    triton_dialect.dialect.register_dialect(context)
    with context:
        program = ir.Module.parse(ir.StringAttr(settings["ir"]).value_bytes)
        text = program.operation.get_asm(enable_debug_info=False)
    return re.sub(r'"gpu.barrier"\(\).*', "gpu.barrier", text)


def operations(operation: Any) -> Any:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner
                yield from operations(inner.operation)


def main() -> None:
    """Prints a line of JSON for each kernel."""
    import jax
    import triton
    from triton.backends.compiler import GPUTarget

    from tools.triton_resources import SHAPES, operands_of, plan_of, resources
    from top_jax.kernels.blocks import by_rule
    from top_jax.kernels.pallas_scan import pallas_backward, pallas_forward

    for name in ("ViM-S decay", "ViM-S, both directions", "PlainMamba-L1"):
        shape = next(shape for shape in SHAPES if shape.name == name)
        arguments, plan = operands_of(shape, "bfloat16", 128), plan_of(shape)
        blocks = by_rule("pallas", shape.width, shape.states)
        forward = functools.partial(pallas_forward, plan=plan, blocks=blocks, save=True)
        backward = functools.partial(pallas_backward, plan=plan, blocks=blocks)
        starts = jax.eval_shape(functools.partial(forward, interpret=True), arguments).starts
        dout = jax.ShapeDtypeStruct(arguments.u.shape[1:], "bfloat16")
        for pass_, given in ((forward, (arguments,)), (backward, (arguments, starts, dout))):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "kernel.ttir"
                file.write_text(handed_to_xla(pass_, *given))
                options = {"num_warps": 1, "num_stages": 1}
                kernel = triton.compile(str(file), target=GPUTarget("cuda", 90, 32), options=options)
            row = {"shape": name, "kernel": pass_.func.__name__}
            print(json.dumps(row | resources(kernel.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
