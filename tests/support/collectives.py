"""Counts what a compiled program sends between devices."""

from __future__ import annotations

import math
import re

import jax

COLLECTIVE = re.compile(
    r" = (?P<shapes>\S.*?) (?P<name>all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|reduce-scatter)(?:-start)?\("
)


def traffic(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Returns name and number of elements of every collective of a compiled program."""
    text = program.as_text()
    assert text is not None
    found = []
    for collective in COLLECTIVE.finditer(text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", collective["shapes"])
        elements = sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
        found.append((collective["name"], elements))
    return found
