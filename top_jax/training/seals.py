"""What makes a checkpoint's damage known: the fingerprint of each of its items, saved with it.

Orbax and the file formats below it find a file that is cut short, but not every bit that has flipped.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from top_jax.training.fingerprint import fingerprint


def sealed(
    arrays: dict[str, Any], *, data: dict[str, Any] | None = None, metrics: dict[str, float] | None = None
) -> ocp.args.Composite:
    """What is to be saved: items of arrays, where given one of JSON, and the fingerprint of each.

    Args:
        arrays: trees by the name of their item.
        data: becomes the item "data".
        metrics: what the manager saves by itself, which is only fingerprinted here.
    """
    items: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in arrays.items()}
    seal = {name: fingerprint(item) for name, item in arrays.items()}
    if data is not None:
        items["data"], seal["data"] = ocp.args.JsonSave(data), _checksum(data)
    if metrics is not None:
        seal["metrics"] = _checksum(metrics)
    return ocp.args.Composite(**items, seal=ocp.args.JsonSave(seal))


def restore_sealed(
    manager: ocp.CheckpointManager, step: int, like: dict[str, Any], *, with_data: bool = False
) -> dict[str, Any]:
    """Items of a checkpoint, each just as it was saved.

    Args:
        manager: of the folder that it is in.
        step: its number.
        like: arrays, or their shapes and shardings, of the items that are wanted.
        with_data: whether the item "data" is wanted too.

    Raises:
        ValueError: an item is not what was saved. Whatever else a damaged file makes Orbax raise.
    """
    abstract = {name: ocp.args.StandardRestore(_abstract(item)) for name, item in like.items()}
    more = {"data": ocp.args.JsonRestore()} if with_data else {}
    with quietly():
        items = manager.restore(step, args=ocp.args.Composite(**abstract, **more, seal=ocp.args.JsonRestore()))
    found = {name: fingerprint(items[name]) for name in like}
    if with_data:
        found["data"] = _checksum(items["data"])
    if broken := [name for name in found if found[name] != items["seal"].get(name)]:
        raise ValueError(f"its {' and '.join(broken)} differ from what was saved")
    return {name: items[name] for name in found}


def check_metrics(folder: Path) -> None:
    """Looks at a checkpoint's metrics before Orbax does, which could not even list a folder with a broken file.

    Raises:
        ValueError, OSError: they cannot be read, or are not what was saved.
    """
    wanted = json.loads((folder / "seal" / "metadata").read_text()).get("metrics")  # a converted one has none
    if wanted is not None and _checksum(json.loads((folder / "metrics" / "metrics").read_text())) != wanted:
        raise ValueError("its accuracy differs from what was saved")


def reason(error: BaseException) -> str:
    """The first line of what was wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:200]


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what Orbax says about a damaged file off the terminal: whoever reads it says it in one line.

    It gives up at the first array that cannot be read. The threads that read the others then find no one waiting, which
    they tell Python's hook for errors that no one can catch, some of them later than this block ends.
    """
    absl, asyncio, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    levels = absl.level, asyncio.level

    def without_late_reads(found: Any) -> None:
        of_orbax = inspect.iscoroutine(found.object) and "orbax" in found.object.cr_code.co_filename
        if not of_orbax and str(found.exc_value) != "Event loop is closed":
            hook(found)

    absl.setLevel(logging.CRITICAL + 1)
    asyncio.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_reads
    try:
        yield
    finally:
        absl.setLevel(levels[0])
    asyncio.setLevel(levels[1])  # these two not where something was raised, because of what comes later
    sys.unraisablehook = hook


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
