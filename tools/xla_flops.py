"""XLA's cost analysis of a model, explained step by step from the multiply-accumulates that we count.

python -m tools.xla_flops --config configs/vim_s_top.py [--dtype float32] [--compile] [--out FILE]

XLA counts a multiplication and an addition as two operations; the body of a loop once, however often it runs; the taps
of a convolution that meet data, not those on its padding; and one operation for each element that an elementwise
operation produces (comparisons and conversions of type too). Exponentials, logarithms and roots are counted apart, as
transcendentals. XLA sums in float32, so a total of billions is off by a few thousand.

Source: `HloCostAnalysis` (openxla/xla, xla/service/hlo_cost_analysis.cc); single primitives, under JAX 0.10.2.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
from pathlib import Path
from typing import Any, Final, NamedTuple

from jax.extend.core import ClosedJaxpr
from jax.lax import GatherScatterMode

from top_jax.build import build_reduction, build_sizes
from top_jax.config import RunConfig
from top_jax.evaluation.flops.of_config import TracedModel, trace_model
from top_jax.evaluation.flops.traced import Site, count_multiplications, macs_of, sites, size_of_result
from top_jax.files import write_json

_TRANSCENDENTAL: Final = ("cbrt", "cos", "erf", "exp", "expm1", "log", "log1p", "pow", "rsqrt", "sin", "sqrt", "tanh")
_ELEMENTWISE: Final = (
    "abs", "add", "add_any", "and", "clamp", "convert_element_type", "div", "eq", "floor", "ge", "gt", "integer_pow",
    "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "select_n", "sign", "square", "sub", "xor",
)  # fmt: skip
# JAX lowers these to several operations: how many per element, besides one transcendental (JAX 0.10.2, a CPU).
_LOWERED_TO: Final = {"logistic": 3, "erfc": 62}


class XlaFlops(NamedTuple):
    """Operations of a program by XLA's rules.

    Attributes:
        products: operations of matrix products and convolutions outside of loops.
        border: operations of convolution taps on padding, which XLA leaves out; not in `products`.
        loops: all operations inside loops, counted once.
        elementwise: elementwise operations outside of loops, taps of shifted products included.
        reductions: operations of sums, extremes, cumulative sums and sorts outside of loops.
        transcendentals: counted apart, inside and outside of loops.
    """

    products: int
    border: int
    loops: int
    elementwise: int
    reductions: int
    transcendentals: int

    @property
    def total(self) -> int:
        """The flops that XLA should report."""
        return self.products + self.loops + self.elementwise + self.reductions


@dataclasses.dataclass(frozen=True)
class XlaCheck:
    """XLA's operations of one image, and how they follow from our multiply-accumulates.

    Attributes:
        flops: XLA's count for the program before it is optimised.
        transcendentals: XLA's count for the same program.
        steps: from the jaxpr's multiply-accumulates to XLA's operations; they add up to what we expect of XLA.
        expected_transcendentals: counted in the jaxpr.
        compiled_flops: XLA's count for the optimised program, or None if it was not compiled.
    """

    flops: int
    transcendentals: int
    steps: dict[str, int]
    expected_transcendentals: int
    compiled_flops: int | None

    @property
    def unexplained(self) -> int:
        """Flops of XLA that the steps do not explain."""
        return self.flops - sum(self.steps.values())


def check_xla(model: TracedModel, *, compile: bool = False) -> XlaCheck | None:
    """Explains XLA's cost analysis of a traced model; returns None if the backend gives none.

    Args:
        model: from `trace_model`.
        compile: also compile the program, which takes a while, for the optimised program's count.
    """
    lowered = model.traced.lower()
    costs = _flops(lowered)
    if costs is None:
        return None
    flops, transcendentals = costs
    counted = count_multiplications(model.traced.jaxpr, model.platform)
    expected = expected_flops(model.traced.jaxpr, model.platform)
    steps = {
        "multiply-accumulates of the jaxpr, times two": 2 * sum(counted),
        "taps on a border's padding, not counted": -expected.border,
        "loops, counted as if they ran once": expected.loops - 2 * counted.loops,
        "elementwise: norms, gates, activations": expected.elementwise - 2 * counted.taps,
        "sums, extremes and sorts": expected.reductions,
    }
    compiled = _flops(lowered.compile()) if compile else None
    return XlaCheck(flops, transcendentals, steps, expected.transcendentals, None if compiled is None else compiled[0])


def expected_flops(program: ClosedJaxpr, platform: str) -> XlaFlops:
    """Counts a program's operations by XLA's rules, before XLA optimises it, for a platform such as `cpu`."""
    counts = dict.fromkeys(XlaFlops._fields, 0)
    for site in sites(program, platform):
        equation = site.equation
        border = 2 * _border_macs(equation)
        products, elementwise, reductions = 2 * macs_of(equation) - border, _elementwise(site), _reductions(equation)
        counts["transcendentals"] += _transcendental(equation)
        if site.trips > 1:
            counts["loops"] += products + elementwise + reductions
            continue
        for name, operations in (
            ("products", products),
            ("border", border),
            ("elementwise", elementwise),
            ("reductions", reductions),
        ):
            counts[name] += operations
    return XlaFlops(**counts)


def _flops(program: Any) -> tuple[int, int] | None:
    """Returns XLA's flops and transcendentals of a lowered or compiled program."""
    costs: dict[str, float] | None = program.cost_analysis()
    return (int(costs["flops"]), int(costs.get("transcendentals", 0))) if costs and "flops" in costs else None


def _elementwise(site: Site) -> int:
    name, size = site.equation.primitive.name, size_of_result(site.equation)
    # JAX removes x + 0 and x - 0 before XLA sees them.
    if (name == "add" and "zero" in site.operands) or (name == "sub" and site.operands[1] == "zero"):
        return 0
    if name == "gather" and site.equation.params["mode"] == GatherScatterMode.FILL_OR_DROP:
        return size + 3 * math.prod(site.equation.invars[1].aval.shape)  # a select by whether the index is in range
    return size if name in _ELEMENTWISE else size * _LOWERED_TO.get(name, 0)


def _transcendental(equation: Any) -> int:
    name = equation.primitive.name
    return size_of_result(equation) if name in _TRANSCENDENTAL or name in _LOWERED_TO else 0


def _reductions(equation: Any) -> int:
    name, operand = equation.primitive.name, equation.invars[0] if equation.invars else None
    if operand is None:
        return 0
    size = math.prod(operand.aval.shape)
    if name.startswith("reduce_"):
        return size - size_of_result(equation)
    if name.startswith("cum"):  # for each element, a window over all elements before it
        return size * (operand.aval.shape[equation.params["axis"]] - 1)
    return size * math.ceil(math.log2(size)) if name == "sort" and size > 1 else 0


def _border_macs(equation: Any) -> int:
    """Counts the multiply-accumulates of a convolution's taps on its padding."""
    if equation.primitive.name != "conv_general_dilated":
        return 0
    params, numbers = equation.params, equation.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in (*equation.invars[:2], *equation.outvars)]
    all_taps = inside_taps = 1
    for axis, (stride, (low, _)) in enumerate(zip(params["window_strides"], params["padding"], strict=True)):
        specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        size, taps, places = (shape[spec[2 + axis]] for shape, spec in zip(shapes, specs, strict=True))
        inside = (0 <= place * stride + tap - low < size for place in range(places) for tap in range(taps))
        all_taps, inside_taps = all_taps * places * taps, inside_taps * sum(inside)
    return macs_of(equation) * (all_taps - inside_taps) // all_taps


def main() -> None:
    """Prints the explanation, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="run config, such as configs/vim_s_top.py")
    parser.add_argument("--dtype", help="computation dtype instead of the config's")
    parser.add_argument("--compile", action="store_true", help="also count the optimised program (slow)")
    parser.add_argument("--out", type=Path, help="write the counts here as JSON")
    arguments = parser.parse_args()
    settings = runpy.run_path(str(arguments.config))["get_config"]()
    if arguments.dtype:
        settings.model.dtype = arguments.dtype
    config = RunConfig.from_config_dict(settings)
    model = trace_model(build_sizes(config.model), build_reduction(config.pruning))
    check = check_xla(model, compile=arguments.compile)
    if check is None:
        raise SystemExit(f"XLA gives no cost analysis on {model.platform}; run it on a CPU: JAX_PLATFORMS=cpu.")
    print(f"{arguments.config.stem}, {config.model.dtype}, one image, {model.platform}: operations")
    for name, operations in check.steps.items():
        print(f"{operations:+20,}  {name}")
    print(f"{sum(check.steps.values()):20,}  expected")
    print(f"{check.flops:20,}  XLA, before it optimises the program")
    print(f"{check.unexplained:+20,}  not explained ({check.unexplained / check.flops:+.3%})")
    print(f"{check.transcendentals:20,}  exponentials, logarithms and roots", end=" ")
    print(f"({check.transcendentals - check.expected_transcendentals:+,} beyond the jaxpr's)")
    if check.compiled_flops is not None:
        print(f"{check.compiled_flops:20,}  XLA, optimised ({check.compiled_flops / check.flops - 1:+.2%})")
    if arguments.out:
        write_json(arguments.out, {**dataclasses.asdict(check), "unexplained": check.unexplained})


if __name__ == "__main__":
    main()
