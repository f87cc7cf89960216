"""Compiles the Triton kernels for NVIDIA GPUs, on a machine without one, and prints the resources that they use.

python -m tools.triton_resources [--arch 80 90 100] [--shapes NAME ...] [--json FILE]

Registers, stack and local memory are those the assembler reports (cuobjdump --dump-resource-usage); stack or local
memory above 0 is a spill. Instructions are counted in the machine code (nvdisasm) and divided by the unrolled steps of
a chunk. The result is what one warp issues for a token in one direction, with the prologue and all loops; exponentials
(MUFU.EX2), shuffles (SHFL) and barriers (BAR) are also counted separately. Both programs are part of Triton's package.
`layouts` counts the distributions over threads in which the backward loads and stores whole states. Nothing is run or
timed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.errors import InputError
from top_jax.files import save_json
from top_jax.kernels.blocks import by_rule
from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.kernels.triton_scan import KernelCall, backward_call, forward_call
from top_jax.optional import optional_package
from top_jax.tables import rows_as_text

_POINTERS: Final = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


class Shape(NamedTuple):
    """Sizes of a model's scan (letters as in `top_jax.typing`), its directions, and its optional operands."""

    name: str
    length: int
    width: int
    states: int
    directions: int = 1
    decay: bool = False
    ordered: bool = False


# N is 16 in every published ViM and PlainMamba.
SHAPES: Final = (
    Shape("ViM-T", 197, 384, 16),
    Shape("ViM-S", 197, 768, 16),
    Shape("ViM-S decay", 157, 768, 16, decay=True),
    Shape("ViM-B", 197, 1536, 16),
    Shape("ViM-S, both directions", 197, 768, 16, directions=2),
    Shape("PlainMamba-L1", 196, 384, 16, directions=4, ordered=True),
    Shape("PlainMamba-L3 decay", 138, 896, 16, directions=4, decay=True, ordered=True),
)


def compile_report(arch: int, shape: Shape, dtype: str = "bfloat16", batch: int = 128) -> list[dict[str, Any]]:
    """Compiles forward (with saved states) and backward, and returns a row for each.

    Args:
        arch: compute capability times 10, such as 90.
        shape: sizes of the scan.
        dtype: dtype of u and delta.
        batch: images; it does not change the rows.
    """
    plan, blocks = plan_of(shape), by_rule("triton", shape.width, shape.states)
    arguments = operands_of(shape, dtype, batch)
    forward = forward_call(arguments, plan, blocks, save=True)
    dout = jax.ShapeDtypeStruct(arguments.u.shape[1:], arguments.u.dtype)
    rows = []
    for call in (forward, backward_call(arguments, forward.outputs[-1], dout, plan, blocks)):
        built = _compile(call, arch)
        chunk = blocks.backward_chunk  # a tile of states: 32 lanes, 32 / chunk of them for each step
        tile = f"32x{call.constants['block_e'] * chunk // 32}x{call.constants['block_n'] // chunk}x"
        usage = resources(built["cubin"])
        per_step = ("instructions", "exponentials", "shuffles", "barriers")
        rows.append(
            {
                "arch": f"sm_{arch}",
                "shape": shape.name,
                "kernel": call.kernel,
                "dtype": dtype,
                "channels": call.constants["block_e"],
                **{key: usage[key] for key in ("registers", "stack", "local", "shared")},
                "layouts": len(set(re.findall(rf"tt\.(?:load|store).*<{tile}!tt\.ptr<f32>, (\S+)>", built["ttgir"]))),
                **{key: round(usage[key] / call.constants.get("chunk", chunk), 1) for key in per_step},
            }
        )
    return rows


def plan_of(shape: Shape) -> ScanPlan:
    """The directions of a shape, as the models that have it run them."""
    return ScanPlan((False, True)[: shape.directions] if shape.directions < 3 else (False,) * shape.directions, False)


def _triton(module: str = "") -> Any:
    """Imports Triton or one of its modules."""
    return optional_package(f"triton.{module}".rstrip("."), purpose="the report", install="'top-jax[kernels]'")


def resources(cubin: bytes) -> dict[str, int]:
    """Returns a compiled kernel's registers, bytes of stack, local and shared memory, and counts of instructions."""
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
        "barriers": count("BAR"),
    }


def _compile(call: KernelCall, arch: int) -> Any:
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
    return triton.compile(source, target=target, options=options).asm


def _output_of(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def operands_of(shape: Shape, dtype: str, batch: int) -> ScanArguments:
    """Returns the shapes and dtypes of a scan's arguments."""
    of: Any = jax.ShapeDtypeStruct
    directions, tokens = shape.directions, (batch, shape.length, shape.width)
    shared = 1 if shape.ordered else directions
    small = of((directions, batch, shape.length, shape.states), jnp.float32)
    channel = of((directions, shape.width), jnp.float32)
    steps = (directions, batch, shape.length)
    return ScanArguments(
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


def main() -> None:
    """Parses the command line, compiles, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capability times 10")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="only these; default: " + ", ".join(s.name for s in SHAPES)
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    try:
        triton = _triton()
    except InputError as error:
        parser.error(str(error))

    shapes = [shape for shape in SHAPES if shape.name in (options.shapes or [shape.name])]
    unknown = sorted(set(options.shapes or ()) - {shape.name for shape in shapes})
    if unknown:
        parser.error(f"--shapes: there is no {', '.join(unknown)}; there are: {', '.join(s.name for s in SHAPES)}")
    rows = []
    for arch in options.arch:
        for shape in shapes:
            print(f"compiling {shape.name} for sm_{arch}", file=sys.stderr)
            rows += compile_report(arch, shape, options.dtype)
    print(rows_as_text(rows))
    if options.json:
        save_json(options.json, {"triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
