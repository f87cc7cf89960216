"""Seals of checkpoints: fingerprints that prove damage, and the checks that distinguish damage from other errors.

Orbax and the file formats below it detect a file that is cut short, but not every flipped bit. So each checkpoint holds
the fingerprint of each of its items.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import inspect
import json
import logging
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from top_jax.errors import InputError
from top_jax.values import counted

PRIME: Final = 2654435761  # Knuth's, 2**32 divided by the golden ratio: maps neighbouring positions to distant numbers
UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes
LATE_READS_SECONDS: Final = 60.0  # how long to wait for reads that are still running after an error

# Errors that an intact checkpoint can cause too, by a limit of the machine: errno values, TensorStore and XLA codes.
LIMITS: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM)
LIMIT_CODES: Final = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


class Damaged(Exception):
    """Raised when a seal or a file of a checkpoint differs from what was saved; the message is one line."""


def fingerprint(tree: Any) -> int:
    """Hashes every value and its position; the result does not depend on how arrays are split over devices.

    The bits of each value are scrambled together with its position, by a bijection. The results are summed modulo
    2**32, so that the order of the sum does not matter. Each device does so with its values. NumPy does so with those
    in this host's memory, because compiling a program for each shape takes longer.

    Args:
        tree: arrays of at most 32 bits per value; with several processes all must call this.

    Returns:
        0 .. 2**32 - 1.
    """
    sums = jax.device_get([_sum_by_numpy(x) if _in_memory(x) else _sum_by_devices(x) for x in jax.tree.leaves(tree)])
    return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


def _in_memory(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or [device.platform for device in leaf.sharding.device_set] == ["cpu"]


def _sum_by_numpy(leaf: Any) -> np.uint32:
    array = np.asarray(leaf)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    with np.errstate(over="ignore"):  # modulo 2**32
        return _sum_of_scrambled(array.view(UNSIGNED[array.dtype.itemsize]), np)


@jax.jit
def _sum_by_devices(array: jax.Array) -> jax.Array:
    return _sum_of_scrambled(jax.lax.bitcast_convert_type(array, UNSIGNED[array.dtype.itemsize]), jnp)


def _sum_of_scrambled(bits: Any, xp: Any) -> Any:
    """Sums unsigned integers, scrambled with their positions, by the operations of `xp`, NumPy or jax.numpy."""
    place = xp.zeros(bits.shape, np.uint32)
    for axis, size in enumerate(bits.shape):  # by axis, because flattening would gather an array that is split
        along = xp.arange(size, dtype=np.uint32).reshape((size,) + (1,) * (bits.ndim - axis - 1))
        place = (place + along) * np.uint32(PRIME)
    return xp.sum(_scrambled(bits.astype(np.uint32) ^ _scrambled(place)), dtype=np.uint32)


def _scrambled(x: Any) -> Any:
    """Maps uint32 to uint32, one to one. Source: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def sealed(
    arrays: dict[str, Any], *, data: dict[str, Any] | None = None, metrics: dict[str, float] | None = None
) -> ocp.args.Composite:
    """Builds the arguments for Orbax to save: items of arrays, an optional item of JSON, and the fingerprint of each.

    Args:
        arrays: trees by the name of their item.
        data: becomes the item "data".
        metrics: only fingerprinted here, because the manager saves them.
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
    """Restores items of a checkpoint, and checks that every bit is as it was saved.

    Args:
        manager: Orbax's manager of the folder that holds the checkpoint.
        step: its number.
        like: arrays, or their shapes and shardings, for the items to restore.
        with_data: whether to restore the item "data" too.

    Raises:
        Damaged: an item differs from what was saved, or a file cannot be read.
        InputError: the checkpoint is intact but has another layout; the message names the first array that differs.
        MemoryError, jax.errors.JaxRuntimeError, OSError: a limit of this machine; the checkpoint may be intact.
    """
    folder = Path(manager.directory) / str(step)
    with reading():
        for name, item in like.items():
            saved = _saved_layout(folder / name)
            if difference := layout_difference(saved, item):
                # A flipped bit can change the layout too, so the seal decides: it raises Damaged where it is broken.
                _restore(manager, step, {name: _placed(saved, like=item)}, with_data=False)
                raise InputError(
                    f"checkpoint {folder} has another layout than this run: {name}.{difference}. It was written with "
                    "other settings or by another version of the code; use those, or choose another --workdir."
                )
        return _restore(manager, step, like, with_data=with_data)


def _restore(manager: ocp.CheckpointManager, step: int, like: dict[str, Any], *, with_data: bool) -> dict[str, Any]:
    abstract = {name: ocp.args.StandardRestore(_abstract(item)) for name, item in like.items()}
    more = {"data": ocp.args.JsonRestore()} if with_data else {}
    items = manager.restore(step, args=ocp.args.Composite(**abstract, **more, seal=ocp.args.JsonRestore()))
    found = {name: fingerprint(items[name]) for name in like}
    if with_data:
        found["data"] = _checksum(items["data"])
    if broken := [name for name in found if found[name] != items["seal"].get(name)]:
        raise Damaged(f"its {' and '.join(broken)} differ from what was saved")
    return {name: items[name] for name in found}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _saved_layout(item: Path) -> Any:
    """Returns shapes and dtypes of an item on disk, as a tree; its numbered keys are ints, as when it was saved."""

    def with_ints(node: Any) -> Any:
        if isinstance(node, dict):
            return {int(key) if key.isdigit() else key: with_ints(value) for key, value in node.items()}
        return [with_ints(value) for value in node] if isinstance(node, list | tuple) else node

    with ocp.StandardCheckpointer() as reader:
        found = reader.metadata(item).item_metadata
    if found is None:  # Orbax does not say why
        raise Damaged(f"the list of arrays of its {item.name} is missing or cannot be read")
    return with_ints(found.tree)


def layout_difference(there: Any, here: Any) -> str | None:
    """Describes how the arrays of two trees differ in path, dtype or shape; None if they do not.

    Returns:
        The first array that differs, such as "head.bias (float32[10] there, float32[3] here)", and how many more do.
    """
    there, here = _by_path(there), _by_path(here)
    different = [path for path in here | there if there.get(path) != here.get(path)]
    if not different:
        return None
    first, more = different[0], f" and {counted(len(different) - 1, 'other array')}" if len(different) > 1 else ""
    return f"{first} ({there.get(first, 'absent')} there, {here.get(first, 'absent')} here){more}"


def _by_path(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _placed(saved: Any, like: Any) -> Any:
    """Returns the layout on disk, to be restored whole on every device of `like`."""
    place = jax.tree.leaves(like)[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), saved)


def check_metrics(folder: Path) -> None:
    """Checks a checkpoint's metrics before Orbax reads them: with a broken file Orbax cannot even list the folder.

    Raises:
        ValueError, OSError: they cannot be read, or differ from what was saved.
    """
    wanted = json.loads((folder / "seal" / "metadata").read_text()).get("metrics")  # a converted checkpoint has none
    if wanted is not None and _checksum(json.loads((folder / "metrics" / "metrics").read_text())) != wanted:
        raise ValueError("its accuracy differs from what was saved")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns Orbax's errors for a damaged file into `Damaged`, and keeps Orbax's own reports off the terminal.

    Orbax stops at the first array that it cannot read. The threads that read the other arrays then report to
    `sys.unraisablehook`, some of them later, that no one waits for them. So after an error the block waits for these
    threads, and only then restores the hook.

    Raises:
        Damaged: the block raised an error, except an InputError or an error that an intact checkpoint can cause too.
    """
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]

    def without_late_reads(found: Any) -> None:
        of_orbax = inspect.iscoroutine(found.object) and "orbax" in found.object.cr_code.co_filename
        if not of_orbax and str(found.exc_value) != "Event loop is closed":
            hook(found)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_reads
    try:
        yield
    except (Damaged, InputError):
        raise
    except Exception as error:
        _end_late_reads(error)
        if _is_limit(error):
            raise
        raise Damaged(_reason(error)) from error
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _end_late_reads(error: BaseException) -> None:
    """Waits for the reads that an error left running, and frees the references to them."""
    # Orbax keeps no handle to its reads, but the garbage collector can find them.
    reads = [found for found in gc.get_objects() if isinstance(found, tensorstore.Future)]
    ended = threading.Semaphore(0)
    for read in reads:
        read.add_done_callback(lambda _: ended.release())  # runs after Orbax's own callback, which is what reports
    for _ in reads:
        if not ended.acquire(timeout=LATE_READS_SECONDS):
            break
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)  # the frames hold unfinished coroutines
        cause = cause.__cause__ or cause.__context__
    del reads
    gc.collect()


def _is_limit(error: BaseException | None) -> bool:
    """Whether an error or its cause is a limit of this machine, such as its memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in LIMITS):
            return True
        if any(code in str(error) for code in LIMIT_CODES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    """Returns the first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:200]
