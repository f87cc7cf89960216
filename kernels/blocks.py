"""Block sizes of the GPU kernels: those given, else those of the device's tuning table, else those of a rule.

`top-jax benchmark --tune` measures and writes `tuning/<device>.json`; no table is written by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, Final

from top_jax.errors import InputError
from top_jax.files import write_json

TUNING: Final = Path(__file__).parent / "tuning"
KERNELS: Final = 3  # generation of the kernels; blocks tuned for another generation do not apply
_MOST_WARPS: Final = 32  # per CUDA block
_MOST_OF_A_BLOCK: Final = 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes: how the kernels divide a scan among programs, warps and chunks.

    Attributes:
        segment: steps between two saved states; a multiple of both chunks. Where it is longer than `backward_chunk`,
            the backward runs the forward through each segment once more. Pallas needs all three equal.
        forward_chunk: steps that the forward pass unrolls.
        forward_channels: channels of one program of the forward pass, a power of two.
        forward_warps: warps (of 32 threads) of that program, a power of two.
        backward_chunk: as `forward_chunk`, for the backward.
        backward_channels: as `forward_channels`, for the backward.
        backward_warps: as `forward_warps`, for the backward.
    """

    segment: int
    forward_chunk: int
    forward_channels: int
    forward_warps: int
    backward_chunk: int
    backward_channels: int
    backward_warps: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = _MOST_WARPS if field.name.endswith("warps") else _MOST_OF_A_BLOCK
            steps = not field.name.endswith(("warps", "channels"))
            power = steps or (isinstance(value, int) and value & (value - 1) == 0)
            if not isinstance(value, int) or isinstance(value, bool) or not (0 < value <= most) or not power:
                need = f"an int from 1 to {most}{'' if steps else ', a power of two'}"
                raise InputError(f"{field.name}={value!r}; needed: {need}.")
        for name in ("forward_chunk", "backward_chunk"):
            if self.segment % getattr(self, name):
                raise InputError(f"segment={self.segment} is not a multiple of {name}={getattr(self, name)}; pass one.")


def choose_blocks(implementation: str, device: str, width: int, states: int) -> tuple[Blocks, str]:
    """Chooses the blocks for a shape on a device; also returns their source (`table` or `rule`).

    Args:
        implementation: `pallas` or `triton`.
        device: JAX's device_kind.
        width: channels, E.
        states: state size, N.
    """
    table = read_table(device)
    entry = (table or {}).get("blocks", {}).get(table_key(implementation, width, states))
    return (by_rule(implementation, width, states), "rule") if entry is None else (Blocks(**entry), "table")


def by_rule(implementation: str, width: int, states: int) -> Blocks:
    """Returns the blocks that give a thread as much state as its registers hold (tests/kernels/test_*_compiles.py)."""
    padded, most = power_of_two(states), power_of_two(width)
    of_512 = min(max(512 // padded, 8), 128, most)  # 16 elements of the state for each thread of a warp
    if implementation == "pallas":
        return Blocks(3, 3, of_512, 1, 3, of_512, 1)
    return Blocks(24, 4, min(64 if padded <= 16 else 32, most), 1, 4, max(min(of_512, 32), 8), 1)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@functools.cache
def read_table(device: str) -> dict[str, Any] | None:
    """The tuning table of a device, or None if these kernels were never tuned on it.

    Raises:
        InputError: the file is not one that `write_table` wrote.
    """
    path = table_path(device)
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text())
    except ValueError:
        table = None
    if not isinstance(table, dict) or not {"fastest_first", "date", "blocks"} <= table.keys():
        raise InputError(
            f"the tuning table {path} is damaged: it needs fastest_first, date and blocks; delete it, or tune again "
            "(top-jax benchmark --tune)."
        )
    return table if table.get("kernels") == KERNELS else None


def table_path(device: str) -> Path:
    """The file of a device's tuning table: `nvidia-h200.json` for `NVIDIA H200`."""
    return TUNING / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write_table(table: dict[str, Any], file: Path) -> None:
    """Writes a tuning table, whole or not at all, and clears the cache of `read_table`.

    Args:
        table: `device` (JAX's device_kind), `kernels` (`KERNELS`), `date`, `fastest_first` (names that `auto` tries in
            turn), `blocks` (the fields of `Blocks` by `table_key`), and any other fields.
        file: `table_path(device)`, where `read_table` looks.

    Raises:
        OSError: it cannot be written there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, table)
    read_table.cache_clear()


def table_key(implementation: str, width: int, states: int) -> str:
    """The key of a shape in a table's `blocks`."""
    return f"{implementation}/E{width}/N{states}"
