"""A full disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import runs

from faults.bench import Bench, Tally


class Skipped(Exception):
    """Raised if a fault cannot be tried here; the message says why."""


def full_disk(bench: Bench, tally: Tally) -> None:
    """Fills the disk after one or two checkpoints: one line, status 1; with more room the run goes on from the last."""
    from top_jax.training.weights import SLACK_BYTES

    reference = bench.finished()
    disk, workdir = bench.workdir("disk"), bench.workdir("after-a-full-disk")
    disk.mkdir()
    size = int(SLACK_BYTES + 2.05 * _size(reference / "checkpoints" / "latest"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("needs to mount a small file system")
    tally.done, tally.tried = f"a disk of {size / 1e6:.1f} MB", 1
    try:
        started = bench.start(disk / "run")
        line = started.one_line_error()
        kept = runs.latest_step(disk / "run")
        assert line.startswith("error: the disk is full: a checkpoint needs ") and str(disk) in line
        assert line.endswith(f"the checkpoint of step {kept} is kept. Make room and start the same command again.")
        assert not list(disk.glob("run/checkpoints/*/*tmp*"))
        tally.steps_lost = max(0, started.last_step() - kept)
        shutil.copytree(disk / "run", workdir)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    started = bench.start(workdir).end()
    assert started.first_step() == kept > 0
    tally.same(workdir, reference)


def _size(folder: Path) -> int:
    """Returns the size of the newest checkpoint in bytes, in whole blocks."""
    newest = folder / str(max(int(path.name) for path in folder.iterdir() if path.name.isdigit()))
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in newest.rglob("*"))
