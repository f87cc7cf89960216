"""Token reduction methods by the names that configs use."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from top_jax.errors import InputError
from top_jax.pruning.evit import Evit
from top_jax.pruning.merging import Merging
from top_jax.pruning.reduction import Reduction
from top_jax.pruning.top import Pruning
from top_jax.values import one_of

METHODS: Final[dict[str, type[Reduction]]] = {"top": Pruning, "evit": Evit, "merge": Merging}


def make_reduction(method: str, **settings: Any) -> Reduction:
    """Builds the reduction of a method, by its name.

    Raises:
        InputError: an unknown method, a setting that it does not have, or a value out of range.
    """
    one_of("pruning method", method, METHODS)
    known = [field.name for field in dataclasses.fields(METHODS[method]) if field.init]
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(
            f"pruning method {method!r} has no setting {unknown[0]!r}, only {', '.join(known)}; remove it from "
            "the config, or choose the method that has it."
        )
    return METHODS[method](**settings)
