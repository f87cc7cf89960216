"""Summarises every key of a checkpoint: shapes and sizes by module, and the changes made in loading."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from typing import Any, Final

from flax import nnx

from top_jax.convert.key_maps import official_keys, segmenter_keys
from top_jax.models import Backbone, Segmenter
from top_jax.models.weights import variables_by_path
from top_jax.values import counted

WIDTH: Final = 100  # characters in a line
NO_BREAK: Final = "\xa0"  # non-breaking space


@dataclasses.dataclass(frozen=True)
class Group:
    """The keys of one module; the repeated blocks form one group.

    Attributes:
        name: official name of the module, such as patch_embed or backbone.layers.
        blocks: number of repeated blocks, or None.
        keys: number of keys, over all blocks.
        parameters: number of trained values in them.
        buffers: number of values in them that are not trained (running statistics).
        shapes: PyTorch's shape, by the rest of the key.
        blocks_with: number of blocks that have the key, by the rest of the key.
    """

    name: str
    blocks: int | None
    keys: int
    parameters: int
    buffers: int
    shapes: dict[str, tuple[int, ...]]
    blocks_with: dict[str, int]


@dataclasses.dataclass(frozen=True)
class KeySummary:
    """All groups of a checkpoint, in its order; `str` gives the table that `convert` prints.

    Attributes:
        groups: the keys, by module.
        turned: number of tensors whose axes are permuted, by the change in words (from the file to the model; for a
            file that is written, from the model to the file).
        changes: what else loading changed, in words.
    """

    groups: tuple[Group, ...]
    turned: dict[str, int]
    changes: tuple[str, ...]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return sum(group.keys for group in self.groups)

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(group.parameters for group in self.groups)

    @property
    def buffers(self) -> int:
        """Number of values that are not trained."""
        return sum(group.buffers for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON values."""
        return {
            "keys": self.keys,
            "parameters": self.parameters,
            "buffers": self.buffers,
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "turned": self.turned,
            "changes": list(self.changes),
        }

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            times = f" x {group.blocks}" if group.blocks else ""
            buffers = f" + {group.buffers:,} buffers" if group.buffers else ""
            lines.append(
                f"{group.name + times:<28}{counted(group.keys, 'key'):>10} {group.parameters:>13,} parameters{buffers}"
            )
            shapes = ", ".join(self._shape(group, rest).replace(" ", NO_BREAK) for rest in group.shapes)
            wrapped = textwrap.wrap(shapes, WIDTH, initial_indent="    ", subsequent_indent="    ")
            lines += [line.replace(NO_BREAK, " ") for line in wrapped]
        buffers = f", {self.buffers:,} values in buffers" if self.buffers else ""
        lines.append(f"all together: {self.keys} keys, {self.parameters:,} parameters{buffers}")
        lines += [f"axes turned in {counted(count, 'tensor')}: {what}" for what, count in self.turned.items()]
        return "\n".join([*lines, *self.changes])

    @staticmethod
    def _shape(group: Group, rest: str) -> str:
        some = group.blocks is not None and group.blocks_with[rest] < group.blocks
        of = f" (in {group.blocks_with[rest]} of {group.blocks})" if some else ""
        return f"{rest} {list(group.shapes[rest])}{of}".lstrip()


def key_summary(model: Backbone | Segmenter, changes: tuple[str, ...] = (), *, writing: bool = False) -> KeySummary:
    """Summarises the official checkpoint of a model.

    Args:
        model: with or without weights.
        changes: what loading changed, in words (from `load_state_dict`).
        writing: whether the checkpoint is written from the model instead of read into it.
    """
    weights = variables_by_path(model)
    turned, found = Counter(), {}
    for key in segmenter_keys(model.config) if isinstance(model, Segmenter) else official_keys(model.config):
        weight = weights[key.ours]
        if key.layout.meaning:
            there, here = key.layout.meaning.split(" -> ")
            turned[f"{here} -> {there}" if writing else key.layout.meaning] += 1
        name, block, rest = _split(key.torch)
        entry = found.setdefault(name, {"blocks": set(), "sizes": Counter(), "with": Counter(), "shapes": {}})
        entry["blocks"] |= {block} - {None}
        entry["sizes"][isinstance(weight, nnx.Param)] += math.prod(weight.shape)
        entry["with"][rest] += 1
        entry["shapes"][rest] = key.layout.torch_shape(weight.shape)
    groups = (
        Group(
            name=name,
            blocks=len(entry["blocks"]) or None,
            keys=entry["with"].total(),
            parameters=entry["sizes"][True],
            buffers=entry["sizes"][False],
            shapes=entry["shapes"],
            blocks_with=dict(entry["with"]),
        )
        for name, entry in found.items()
    )
    return KeySummary(tuple(groups), dict(turned), changes)


def _split(key: str) -> tuple[str, int | None, str]:
    """Splits a key: backbone.layers.3.norm.weight -> backbone.layers, 3, norm.weight."""
    parts = key.split(".")
    depth = 2 if parts[0] == "backbone" else 1
    name, rest = ".".join(parts[:depth]), parts[depth:]
    block = int(rest.pop(0)) if rest and rest[0].isdigit() else None
    return name, block, ".".join(rest)
