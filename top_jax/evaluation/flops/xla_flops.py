"""What XLA's cost analysis should say of a traced function, by its rules as far as we know them.

XLA counts a multiplication and an addition as two operations; the body of a loop once, however often it runs; the taps
of a convolution that meet something, not those on its padding; one operation for each element of whatever works element
by element (comparisons and conversions of type too), but exponentials, logarithms and roots apart, as transcendentals.
It adds up in 32-bit floats, so that a sum of billions is off by some thousands.

Source: `HloCostAnalysis` (openxla/xla, xla/service/hlo_cost_analysis.cc); single primitives, under JAX 0.10.2.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from jax.extend.core import ClosedJaxpr
from jax.lax import GatherScatterMode

from top_jax.evaluation.flops.traced import Site, macs_of, sites, size_of_result

_TRANSCENDENTAL: Final = ("cbrt", "cos", "erf", "exp", "expm1", "log", "log1p", "pow", "rsqrt", "sin", "sqrt", "tanh")
_ELEMENTWISE: Final = (
    "abs", "add", "add_any", "and", "clamp", "convert_element_type", "div", "eq", "floor", "ge", "gt", "integer_pow",
    "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "select_n", "sign", "square", "sub", "xor",
)  # fmt: skip
# What JAX writes out in other operations: operations, beside one transcendental, of an element (JAX 0.10.2, a CPU).
_WRITTEN_OUT: Final = {"logistic": 3, "erfc": 62}


class XlaFlops(NamedTuple):
    """Operations by XLA's rules.

    Attributes:
        products: of matrix products and convolutions outside of loops.
        border: of taps of convolutions on their padding, which XLA leaves out; not in `products`.
        loops: of everything in loops, once.
        elementwise: of what works element by element outside of loops, taps of shifted products included.
        gathering: of sums, extremes, cumulative sums and sorts outside of loops.
        transcendentals: counted apart, everywhere.
    """

    products: int
    border: int
    loops: int
    elementwise: int
    gathering: int
    transcendentals: int

    @property
    def total(self) -> int:
        """What XLA should call flops."""
        return self.products + self.loops + self.elementwise + self.gathering


def expected_flops(program: ClosedJaxpr, platform: str) -> XlaFlops:
    """Of a program before XLA optimises it, on a platform such as `cpu`."""
    counts = dict.fromkeys(XlaFlops._fields, 0)
    for site in sites(program, platform):
        equation = site.equation
        border = 2 * _border_macs(equation)
        products, elementwise, gathering = 2 * macs_of(equation) - border, _elementwise(site), _gathering(equation)
        counts["transcendentals"] += _transcendental(equation)
        if site.trips > 1:
            counts["loops"] += products + elementwise + gathering
            continue
        for name, operations in (
            ("products", products),
            ("border", border),
            ("elementwise", elementwise),
            ("gathering", gathering),
        ):
            counts[name] += operations
    return XlaFlops(**counts)


def _elementwise(site: Site) -> int:
    name, size = site.equation.primitive.name, size_of_result(site.equation)
    # x + 0 and x - 0 are gone before XLA sees them.
    if (name == "add" and "zero" in site.operands) or (name == "sub" and site.operands[1] == "zero"):
        return 0
    if name == "gather" and site.equation.params["mode"] == GatherScatterMode.FILL_OR_DROP:
        return size + 3 * math.prod(site.equation.invars[1].aval.shape)  # chosen by whether its index is a place
    return size if name in _ELEMENTWISE else size * _WRITTEN_OUT.get(name, 0)


def _transcendental(equation: Any) -> int:
    name = equation.primitive.name
    return size_of_result(equation) if name in _TRANSCENDENTAL or name in _WRITTEN_OUT else 0


def _gathering(equation: Any) -> int:
    name, operand = equation.primitive.name, equation.invars[0] if equation.invars else None
    if operand is None:
        return 0
    size = math.prod(operand.aval.shape)
    if name.startswith("reduce_"):
        return size - size_of_result(equation)
    if name.startswith("cum"):  # a window over all that came before, for each element
        return size * (operand.aval.shape[equation.params["axis"]] - 1)
    return size * math.ceil(math.log2(size)) if name == "sort" and size > 1 else 0


def _border_macs(equation: Any) -> int:
    """Multiply-accumulates of a convolution's taps on its padding."""
    if equation.primitive.name != "conv_general_dilated":
        return 0
    params, numbers = equation.params, equation.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in (*equation.invars[:2], *equation.outvars)]
    all_taps = met = 1
    for axis, (stride, (low, _)) in enumerate(zip(params["window_strides"], params["padding"], strict=True)):
        specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        size, taps, places = (shape[spec[2 + axis]] for shape, spec in zip(shapes, specs, strict=True))
        inside = (0 <= place * stride + tap - low < size for place in range(places) for tap in range(taps))
        all_taps, met = all_taps * places * taps, met * sum(inside)
    return macs_of(equation) * (all_taps - met) // all_taps
