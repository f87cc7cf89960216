"""Compiles the Triton kernels for GPUs that need not be there, and reads off what they ask of one.

python -m tools.triton_resources [--arch 80 90] [--json FILE]

Registers, stack and local memory are the assembler's (cuobjdump --dump-resource-usage); anything in the last two is a
spill. Instructions are counted in the machine code (nvdisasm) and divided by the unrolled steps of a chunk: what one
warp issues for a token in one direction, prologue included, and of these the exponentials (MUFU.EX2) and the shuffles
(SHFL). The tools are those in Triton's own package. Nothing is launched and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.kernels.blocks import by_rule
from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.kernels.triton_scan import KernelCall, backward_call, forward_call
from top_jax.optional import optional_package

_POINTERS: Final = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


class Shape(NamedTuple):
    """A scan of a model: sizes as in `top_jax.typing`, directions, and what it needs beside u, delta, A, B, C."""

    name: str
    length: int
    width: int
    states: int
    directions: int = 1
    decay: bool = False
    gated: bool = False
    ordered: bool = False


# N is 16 in every published ViM and PlainMamba.
SHAPES: Final = (
    Shape("ViM-T", 197, 384, 16),
    Shape("ViM-S", 197, 768, 16),
    Shape("ViM-S decay", 157, 768, 16, decay=True),
    Shape("ViM-B", 197, 1536, 16),
    Shape("ViM-S, both directions", 197, 768, 16, directions=2, gated=True),
    Shape("PlainMamba-L1", 196, 384, 16, directions=4, gated=True, ordered=True),
    Shape("PlainMamba-L3 decay", 138, 896, 16, directions=4, decay=True, gated=True, ordered=True),
)


def compile_report(arch: int, shape: Shape, dtype: str = "bfloat16", batch: int = 128) -> list[dict[str, Any]]:
    """One row for the forward (that saves states) and one for the backward.

    Args:
        arch: compute capability times 10, such as 90.
        shape: what to compile for.
        dtype: of u, delta and z.
        batch: images; nothing in the rows depends on it.
    """
    plan = ScanPlan((False, True, False, True)[: shape.directions], score="clip" if shape.gated else None)
    blocks = by_rule("triton", shape.width, shape.states)
    arguments, z = operands_of(shape, dtype, batch)
    forward = forward_call(arguments, z, plan, blocks, save=True)
    out, _, starts, _ = forward.outputs
    rows = []
    for call in (forward, backward_call(arguments, z, starts, out, plan, blocks)):
        usage = resources(_compile(call, arch))
        rows.append(
            {
                "arch": f"sm_{arch}",
                "shape": shape.name,
                "kernel": call.kernel,
                "dtype": dtype,
                **{key: usage[key] for key in ("registers", "stack", "local", "shared")},
                **{key: round(usage[key] / blocks.chunk, 1) for key in ("instructions", "exponentials", "shuffles")},
            }
        )
    return rows


def _triton(module: str = "") -> Any:
    """Triton, or one of its modules."""
    return optional_package(f"triton.{module}".rstrip("."), purpose="the report", install="'top-jax[kernels]'")


def resources(cubin: bytes) -> dict[str, int]:
    """What a compiled kernel needs: registers, stack, local and shared bytes, and counts of instructions."""
    triton = _triton()

    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output_of(tools / "nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code))
    count = lambda start: sum(number for name, number in opcodes.items() if name.startswith(start))  # noqa: E731
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": found["SHARED"],
        "instructions": opcodes.total() - opcodes["NOP"],
        "exponentials": count("MUFU.EX2"),
        "shuffles": count("SHFL"),
    }


def _compile(call: KernelCall, arch: int) -> bytes:
    triton = _triton()

    from top_jax.kernels import triton_kernels

    kernel = getattr(triton_kernels, call.kernel)
    dtypes = [jnp.dtype(array.dtype).name for array in (*call.inputs, *call.outputs)]
    pointers = dict(zip(kernel.arg_names, (_POINTERS[dtype] for dtype in dtypes), strict=False))
    index = {name: at for at, name in enumerate(kernel.arg_names)}
    source = _triton("compiler").ASTSource(
        kernel,
        signature=pointers | dict.fromkeys(call.constants, "constexpr"),
        constexprs={(index[name],): value for name, value in call.constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in pointers},  # as XLA aligns its buffers
    )
    options = {"num_warps": call.warps, "num_stages": 1, "enable_fp_fusion": True}
    target = _triton("backends.compiler").GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def _output_of(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def operands_of(shape: Shape, dtype: str, batch: int) -> tuple[ScanArguments, Any]:
    """Shapes and dtypes of a scan's arguments, and of its gate z or None."""
    of: Any = jax.ShapeDtypeStruct
    directions, tokens = shape.directions, (batch, shape.length, shape.width)
    shared = 1 if shape.ordered else directions
    small = of((directions, batch, shape.length, shape.states), jnp.float32)
    channel = of((directions, shape.width), jnp.float32)
    steps = (directions, batch, shape.length)
    arguments = ScanArguments(
        u=of((shared, *tokens), dtype),
        delta=of((shared, *tokens), dtype),
        A=of((directions, shape.width, shape.states), jnp.float32),
        B=small,
        C=small,
        D=channel,
        delta_bias=channel,
        gap=of(steps, jnp.float32) if shape.decay else None,
        order=of(steps, jnp.int32) if shape.ordered else None,
    )
    return arguments, of(tokens, dtype) if shape.gated else None


def main() -> None:
    """Parses the command line, compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capability times 10")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    try:
        triton = _triton()
    except InputError as error:
        parser.error(str(error))

    rows = []
    for arch in options.arch:
        for shape in SHAPES:
            rows += compile_report(arch, shape, options.dtype)
            for row in rows[-2:]:
                if len(rows) == 2 and row is rows[0]:
                    print(_line(dict(zip(row, row, strict=True))))
                print(_line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=2) + "\n")


def _line(row: dict[str, Any]) -> str:
    widths = {"arch": 6, "shape": 24, "kernel": 16, "dtype": 10}
    return " ".join(f"{value:<{widths[key]}}" if key in widths else f"{value:>12}" for key, value in row.items())


if __name__ == "__main__":
    main()
