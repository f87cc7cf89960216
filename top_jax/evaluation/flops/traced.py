"""Counts the multiplications of a traced function from its jaxpr; knows JAX's primitives, but not our models.

The walk enters every function that is called and takes the branch of the given platform. For each array it remembers
whether it is padded, or a window of a padded array: a product with such a window is one tap of a convolution that is
written as shifted products. It also remembers zeros, for `tools/xla_flops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

# Parameters of jit, remat and custom derivatives that hold the jaxpr they call.
_CALLED: Final = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Primitives whose result is padded, a window or zero if their operand is.
_KEEPS: Final = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze")

Kind = Literal["padded", "window", "zero", ""]
"""Kind of an array: padded, a window of a padded array, all zeros, or unknown."""


class Site(NamedTuple):
    """One primitive operation of a program.

    Attributes:
        equation: its equation in the jaxpr.
        trips: number of times it runs.
        in_loop: whether it is in an innermost loop.
        operands: what is known about each operand.
    """

    equation: Any
    trips: int
    in_loop: bool
    operands: tuple[Kind, ...]

    @property
    def is_tap(self) -> bool:
        """Whether the operation is a product with a window of a padded array: one tap of a convolution."""
        return self.equation.primitive.name == "mul" and "window" in self.operands


class Multiplications(NamedTuple):
    """Multiplications of a program.

    Attributes:
        products: multiply-accumulates of matrix products and convolutions.
        taps: multiply-accumulates of convolutions that are written as shifted products.
        loops: multiplications in innermost loops, elementwise and in products: the scans.
    """

    products: int
    taps: int
    loops: int


def count_multiplications(program: ClosedJaxpr, platform: str) -> Multiplications:
    """Counts the multiplications that the program executes on a platform such as `cpu` or `cuda`."""
    products = taps = loops = 0
    for site in sites(program, platform):
        name, macs = site.equation.primitive.name, site.trips * macs_of(site.equation)
        if site.in_loop:
            loops += macs if name != "mul" else site.trips * size_of_result(site.equation)
        else:
            products += macs
            taps += site.trips * size_of_result(site.equation) * site.is_tap
    return Multiplications(products, taps, loops)


def macs_of(equation: Any) -> int:
    """Returns the multiply-accumulates of a matrix product or a convolution, taps on padding included; else 0."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return size_of_result(equation) * math.prod(shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
        return size_of_result(equation) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return 0


def size_of_result(equation: Any) -> int:
    """Returns the number of elements of the (first) result."""
    return math.prod(equation.outvars[0].aval.shape)


def sites(program: ClosedJaxpr, platform: str) -> Iterator[Site]:
    """Yields every primitive that the program runs on the platform and whose result is used.

    A loop whose number of trips depends on the data counts as one trip.
    """
    used, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    walk = _Walk(platform)
    walk.through(used, _nothing(used.invars), 1)
    yield from walk.found


class _Walk:
    """Walks through a program and collects its sites in `found`."""

    def __init__(self, platform: str):
        self.platform = platform
        self.found: list[Site] = []

    def through(self, jaxpr: Jaxpr, given: Sequence[Kind], trips: int, *, in_loop: bool = False) -> list[Kind]:
        """Collects the sites of a function; takes the kinds of its arguments, and returns those of its results."""
        known: dict[Any, Kind] = dict(zip(jaxpr.invars, given, strict=True))

        def of(atom: Any) -> Kind:
            if isinstance(atom, core.Literal):
                return "" if np.any(atom.val) else "zero"
            return known.get(atom, "")

        for equation in jaxpr.eqns:
            arguments: list[Kind] = [of(atom) for atom in equation.invars]
            results: list[Kind] | None = self._inside(equation, arguments, trips, in_loop)
            if results is None:
                self.found.append(Site(equation, trips, in_loop, tuple(arguments)))
                results = [_of_result(equation, arguments) for _ in equation.outvars]
            for array, kind in zip(equation.outvars, results, strict=True):
                known[array] = kind
        return [of(atom) for atom in jaxpr.outvars]

    def _inside(self, equation: Any, arguments: list[Kind], trips: int, in_loop: bool) -> list[Kind] | None:
        """Walks through the function that an equation calls, as `through` does; returns None if it calls none."""
        name, params = equation.primitive.name, equation.params
        if name in ("scan", "while"):
            body = _open(params["jaxpr"] if name == "scan" else params["body_jaxpr"])
            runs = trips * (params["length"] if name == "scan" else 1)
            self.through(body, _nothing(body.invars), runs, in_loop=not _has_loop(body))
            return _nothing(equation.outvars)
        if name == "cond":
            branch = params["branches"][self._branch(params)]
            return self.through(_open(branch), arguments[1:], trips, in_loop=in_loop)
        called = next((params[key] for key in _CALLED if key in params), None)
        if called is None:
            return None
        return self.through(_open(called), arguments, trips, in_loop=in_loop)

    def _branch(self, params: dict[str, Any]) -> int:
        """Picks the platform's branch of `jax.lax.platform_dependent`, and the last ("true") of a condition on data."""
        platforms = params.get("branches_platforms") or ()
        fits = [i for i, names in enumerate(platforms) if names is None or self.platform in names]
        return fits[0] if fits else -1


def _nothing(arrays: Sequence[Any]) -> list[Kind]:
    return ["" for _ in arrays]


def _of_result(equation: Any, arguments: list[Kind]) -> Kind:
    name = equation.primitive.name
    if name == "pad" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return "padded"
    if name == "slice" and arguments[0] in ("padded", "window"):
        return "window"
    return arguments[0] if name in _KEEPS else ""


def _has_loop(jaxpr: Jaxpr) -> bool:
    for equation in jaxpr.eqns:
        inner = [*(equation.params[key] for key in _CALLED if key in equation.params)]
        inner += equation.params.get("branches", ())
        if equation.primitive.name in ("scan", "while") or any(_has_loop(_open(called)) for called in inner):
            return True
    return False


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
