"""The one writer of files: whole or not at all, whoever else writes."""

from __future__ import annotations

import concurrent.futures
import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from top_jax import files

WRITERS, ROUNDS, SIZE = 4, 25, 20_000


def write_many(path: Path, letters: str) -> None:
    """Writes files of one letter each."""
    for letter in letters * ROUNDS:
        files.write_text(path, letter * SIZE)


def test_many_writers_of_one_file(tmp_path):
    """Threads of two processes: whatever a reader meets is one writer's whole file."""
    path = tmp_path / "file"
    files.write_text(path, "-" * SIZE)
    other = multiprocessing.get_context("spawn").Process(target=write_many, args=(path, "xyz"))
    other.start()
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        writing = [pool.submit(write_many, path, "abcd"[number]) for number in range(WRITERS)]
        while other.is_alive() or not all(future.done() for future in writing):
            text = path.read_text()
            assert len(text) == SIZE and len(set(text)) == 1
    other.join()
    assert other.exitcode == 0 and [future.result() for future in writing] == [None] * WRITERS
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced(tmp_path):
    """And so is one that leads nowhere: nothing is written to where it points."""
    (tmp_path / "precious").write_text("kept")
    for target in ("precious", "nowhere", "link"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        files.write_text(link, "new")
        assert not link.is_symlink() and link.read_text() == "new"
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(tmp_path, number):
    """Whatever a library makes of it, the error names the file; the old one stays, and nothing is left behind."""
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="full") as found, files.new_file(path) as temporary:
        temporary.write_text("half")
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error  # as PyTorch does
    assert found.value.filename == str(path) and files.is_full(found.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    assert not files.is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))


def test_one_holds_the_lock(tmp_path):
    refused = []

    def try_it() -> None:
        try:
            with files.lock(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(error)

    for expected in (1, 1):
        with files.lock(tmp_path):
            other = threading.Thread(target=try_it)
            other.start()
            other.join()
        try_it()
        assert len(refused) == expected
        refused.clear()
