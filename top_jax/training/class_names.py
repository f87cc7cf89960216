"""Class names of weights: which class each logit stands for, and the order that a dataset needs."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from top_jax.errors import InputError
from top_jax.models.weights import Weights, is_of_classes

logger = logging.getLogger(__name__)

IMAGENET_CLASSES: Final = 1000
_WORDNET_ID: Final = re.compile(r"n\d{8}")


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """Returns the WordNet ids of ImageNet-1k's classes, in the order of every official checkpoint's logits."""
    return tuple((resources.files("top_jax.data") / "imagenet_synsets.txt").read_text().split())


def in_order_of(names: Sequence[str], weights: Weights, *, kept: Sequence[str] | None, origin: str | Path) -> Weights:
    """Returns weights whose logits are in the order of a dataset's classes, with a warning if any has to move.

    Arguments and errors as for `class_order`; `weights` are the model's.
    """
    if kept is None or (order := class_order(names, kept=kept, origin=origin)) is None:
        return weights
    logger.warning(
        "%s has the data's classes in another order (%s); %d of its %d logits are moved, by class name",
        *(origin, first_difference(kept, names), np.sum(order != np.arange(len(order))), len(names)),
    )
    flat = {
        path: jax.numpy.asarray(array)[..., order] if is_of_classes(path) else array
        for path, array in flatten_dict(weights).items()
    }
    return unflatten_dict(flat)


def class_order(names: Sequence[str], *, kept: Sequence[str] | None, origin: str | Path) -> np.ndarray | None:
    """Returns the logit of each class of a dataset, int `[classes]`; None if the order is the same or not known.

    Numbers, WordNet ids and words cannot be compared with each other; then a warning is logged.

    Args:
        names: the dataset's classes, in the order of its labels.
        kept: the classes of the weights, in the order of the logits; None if they are not known.
        origin: where the weights come from, for messages.

    Raises:
        InputError: the dataset has other classes.
    """
    if kept is None or tuple(kept) == tuple(names):
        return None
    if sorted(kept) == sorted(names) and len(set(names)) == len(names):
        place = {name: index for index, name in enumerate(kept)}
        return np.array([place[name] for name in names])
    if _kind(kept) != _kind(names):
        logger.warning(
            "the classes of %s (%s, ...) and of the data (%s, ...) are named in different ways, so that their order "
            "cannot be compared",
            *(origin, kept[0], names[0]),
        )
        return None
    raise InputError(
        f"{origin} was trained on other classes than this data has: {first_difference(kept, names)}. Use the data that "
        "it was trained on, or rename the class folders (a run's names are in its data.json)."
    )


def first_difference(there: Sequence[str], here: Sequence[str]) -> str:
    """Describes the first class that differs between two lists, and the first name that only one of them has."""
    pairs = list(zip(there, here, strict=False))
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    a, b = (repr(names[place]) if place < len(names) else "absent" for names in (there, here))
    only = ((where, [name for name in names if name not in set(other)])
            for where, names, other in (("there", there, here), ("here", here, there)))  # fmt: skip
    more = "".join(f"; only {where}: {names[0]!r}{', ...' * (len(names) > 1)}" for where, names in only if names)
    return f"class {place} is {a} there and {b} here{more}"


def _kind(names: Sequence[str]) -> str:
    if all(name.isdecimal() for name in names):
        return "numbers"
    return "WordNet ids" if all(_WORDNET_ID.fullmatch(name) for name in names) else "words"
