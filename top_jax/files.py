"""Atomic file writing: at any moment, even after a kill, a path holds the old file or the complete new one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from top_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the process's limit (ulimit -f)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, reports a full disk, whichever library raised it."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks an existing folder against other writers, by a file `.lock` in it, until the block or this process ends.

    On file systems and platforms without locks (Windows) it does nothing.

    Raises:
        BlockingIOError: another process or thread holds it.
        OSError: the folder cannot be written to.
    """
    with (folder / ".lock").open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file to write to; it replaces `path` when the block ends without an error.

    The name is unique, so that two processes or threads never write to the same file: the last to finish wins. A link
    at `path` is replaced, not followed. After an error, nothing is left behind.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except Exception as error:
        if is_full(error):  # some libraries, such as PyTorch, raise an error that does not mention the disk
            raise OSError(errno.ENOSPC, "the disk is full", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises OSError if a file cannot be written at `path`; leaves nothing behind."""
    path = Path(path)
    path.exists()  # raises if the name is too long
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".new-", suffix=".tmp"):
        pass


def check_folder(folder: str | Path, what: str) -> None:
    """Raises InputError if a folder cannot be created or written to, before any work that would be lost.

    Args:
        folder: where a command will write; it need not exist.
        what: its name in the message, such as `--out=pictures`.
    """
    place = Path(folder).absolute()
    try:
        while not place.exists():
            place = place.parent
        check_writable(place / "file")
    except OSError as error:
        raise InputError(f"{what} cannot be written ({error.strerror}); choose another path.") from error


@contextlib.contextmanager
def requested_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file as `new_file` does, for a path that the user chose.

    Raises:
        InputError: the file cannot be written; the message names the path and the reason.
    """
    try:
        with new_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all. Raises OSError as `new_file` does."""
    with new_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file, indented, whole or not at all. Raises OSError as `new_file` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_json(path: str | Path | None, content: Any) -> None:
    """Writes a JSON file to a path that the user chose, if not None. Raises InputError as `requested_file` does."""
    if path is None:
        return
    with requested_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz file, whole or not at all. Raises OSError as `new_file` does."""
    with new_file(path) as temporary:
        _compress(temporary, arrays)


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz file for a path that the user chose. Raises InputError as `requested_file` does."""
    with requested_file(path) as temporary:
        _compress(temporary, arrays)


def _compress(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a name, NumPy would add its suffix
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _sync(path: Path) -> None:
    """Waits until the content is on the disk: if a crash kept only the rename, the file would be empty."""
    with path.open("r+b") as stream:  # Windows syncs only what is open for writing
        os.fsync(stream.fileno())


def _umask() -> int:
    """Returns the process's file mode creation mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
