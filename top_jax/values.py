"""Checks of plain values where they enter the library; a NumPy number becomes Python's own.

Each check returns the value in its plain form, and raises an `InputError` that names the argument and what came.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from top_jax.errors import InputError

LARGEST_COUNT: Final = 2**31 - 1
LARGEST_SIDE: Final = 2**15  # pixels of one side of the model's input
SEEDS: Final = (0, 2**32 - 1)


def refused(name: str, value: Any, needed: str) -> InputError:
    """Returns the error for a value other than what is needed; a value longer than a line is named by its type."""
    return InputError(f"{name}{shown(value)}; needed: {needed}.")


def shown(value: Any) -> str:
    """Formats a value for a message: `=value`, ` is a <type>` if that is too long, or an array's dtype and shape."""
    if getattr(value, "shape", ()) != () and hasattr(value, "dtype"):
        return f" is an array, {value.dtype}{list(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # repr may fail, as for an int of 5,000 digits
        text = "\n"
    return f"={text}" if len(text) <= 200 and "\n" not in text else f" is a {type(value).__name__}"


def counted(number: int, noun: str) -> str:
    """Formats a count with its noun: `1 key`, `1,200 keys`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def whole(name: str, value: Any, least: int | float = 1, most: int | float = LARGEST_COUNT) -> int:
    """Checks that a value is an int of Python or NumPy in [least, most], and not a bool; returns it as an int."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        range_ = f" of at least {least}" if most == LARGEST_COUNT else f" from {least} to {most}"
        raise refused(name, value, "a whole number" + ("" if least == -math.inf else range_))
    return int(value)


def number(name: str, value: Any, needed: str = "a finite number") -> float:
    """Checks that a value is a finite number of Python or NumPy; returns it as a float."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise refused(name, value, needed)
    return float(value)


def share(name: str, value: Any, needed: str = "a share in (0, 1]") -> float:
    """Checks that a value is a number in (0, 1]; returns it as a float."""
    if not 0 < number(name, value, needed) <= 1:
        raise refused(name, value, needed)
    return float(value)


def numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Checks that a sequence or one-dimensional array holds `count` finite numbers; returns them."""
    found = several(name, values, needed := f"{count} finite numbers")
    if len(found) != count:
        raise refused(name, values, needed)
    return tuple(number(f"{name}[{place}]", value) for place, value in enumerate(found))


def several(name: str, values: Any, needed: str) -> tuple[Any, ...]:
    """Returns the items of an ordered collection or a one-dimensional NumPy array; refuses strings and dicts."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return tuple(values.tolist())
    if hasattr(values, "dtype") or not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | set):
        raise refused(name, values, needed)
    return tuple(values)


def flag(name: str, value: Any) -> bool:
    """Checks that a value is a bool of Python or NumPy; returns it as a bool."""
    if not isinstance(value, bool | np.bool_):
        raise refused(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Checks that a value is one of the known strings; returns it."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}{shown(value)} is unknown; choose one of {', '.join(known)}.")
    return value


def path(name: str, value: Any) -> Path:
    """Checks that a value is a string or path-like; returns it as a Path, which need not exist."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise refused(name, value, "a path, as a string or pathlib.Path")
    return Path(text)


def height_width(name: str, value: Any) -> tuple[int, int]:
    """Returns an image size in pixels, given as a side, (side,) or (height, width), as (height, width)."""
    sides = (value,) if isinstance(value, int | np.integer) else value
    needed = f"a side in pixels, or (height, width), each at most {LARGEST_SIDE}"
    if isinstance(sides, np.ndarray) and sides.ndim == 1:
        sides = sides.tolist()
    if not isinstance(sides, list | tuple) or len(sides) not in (1, 2):
        raise refused(name, value, needed)
    try:
        height, width = (whole(name, side, 1, LARGEST_SIDE) for side in (sides[0], sides[-1]))
    except InputError:
        raise refused(name, value, needed) from None
    return height, width


def check_fields(node: Any) -> None:
    """Converts the fields of a frozen dataclass that are annotated as plain types (`_PLAIN`), or raises InputError.

    An `int` is a whole number of any sign, a `float` is finite. The class must have string annotations.
    """
    for field in dataclasses.fields(node):
        if field.type in _PLAIN:
            object.__setattr__(node, field.name, _PLAIN[field.type](field.name, getattr(node, field.name)))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refused(name, value, "a string")
    return value


_PLAIN: Final[dict[Any, Any]] = {
    "int": lambda name, value: whole(name, value, -math.inf, math.inf),
    "float": number,
    "bool": flag,
    "str": _text,
}
