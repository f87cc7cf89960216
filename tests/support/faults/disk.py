"""A full disk, and shared memory that is too small."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import runs

from faults.bench import Bench, Tally


class Skipped(Exception):
    """Raised if a fault cannot be tried here; the message says why."""


def full_disk(bench: Bench, tally: Tally) -> None:
    """Fills the disk after one or two checkpoints: one line, status 1; with more room the run goes on from the last."""
    from top_jax.training.weights import SLACK_BYTES

    reference = bench.finished()
    disk, workdir = bench.workdir("disk"), bench.workdir("after-a-full-disk")
    size = int(SLACK_BYTES + 2.05 * _size(reference / "checkpoints" / "latest"))
    with _small_disk(disk, size):
        tally.done, tally.tried = f"a disk of {size / 1e6:.1f} MB", 1
        started = bench.start(disk / "run")
        line = started.one_line_error()
        kept = runs.latest_step(disk / "run")
        assert line.startswith("error: the disk is full: a checkpoint needs ") and str(disk) in line
        assert line.endswith(f"the checkpoint of step {kept} is kept. Make room and start the same command again.")
        assert not list(disk.glob("run/checkpoints/*/*tmp*"))
        tally.steps_lost = max(0, started.last_step() - kept)
        shutil.copytree(disk / "run", workdir)
    started = bench.start(workdir).end()
    assert started.first_step() == kept > 0
    tally.same(workdir, reference)


CONVERTED: Final = {
    "convert": ("{run}", "{disk}/weights.safetensors"),
    "convert to a run": ("{weights}", "{disk}/run"),
    "pack": ("--config={config}", "{disk}/data.npz"),
    "evaluate": ("--checkpoint={run}", "--json={disk}/result.json"),
}
COMMAND: Final = """
import runpy, sys
command, *sys.argv[1:] = {arguments!r}
sys.argv[0] = command
runpy.run_module(f"top_jax.cli.{{command}}", run_name="__main__")
"""


def full_disk_of_commands(bench: Bench, tally: Tally) -> None:
    """Lets other commands write to a full disk: one line, a status that is not 0, and nothing half written."""
    disk, names = bench.workdir("small"), {"run": bench.finished(), "config": bench.config_file}
    names |= {"disk": disk, "weights": bench.workdir("weights.safetensors")}
    tally.done = f"a disk without room for what {', '.join(CONVERTED)} writes"
    make = ["convert", str(names["run"]), str(names["weights"])]
    bench.start(disk, program=COMMAND.format(arguments=make)).end()
    for what in CONVERTED:
        with _small_disk(disk, 8192):
            (disk / "full").write_bytes(bytes(8192))
            arguments = [what.split()[0], *(text.format(**names) for text in CONVERTED[what])]
            started = bench.start(disk, program=COMMAND.format(arguments=arguments))
            tally.tried += 1
            line = started.one_line_error(started.process.wait() or 1)
            assert any(text in line for text in ("disk is full", "No space left", "needs")), f"{what}: {line}"
            left = [path.name for path in disk.iterdir() if path.name != "full"]
            assert not left, f"{what} left {left}"
            bench.say(f"{what}: {line}")
            tally.survived += 1


# Batches of 60 MB: two of them are more than a container's shared memory.
LARGE: Final = ("--config.model.img_size=(224,)", "--config.model.patch_size=56", "--config.batch_size=100")
SHARED_MEBIBYTES: Final = 64
IN_SMALL_SHARED_MEMORY: Final = f"""
import ctypes, runpy, subprocess, sys
NEW_MOUNTS = 0x20000
assert ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS) == 0, ctypes.get_errno()
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run("mount -t tmpfs -o size={SHARED_MEBIBYTES}m tmpfs /dev/shm".split(), check=True)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def small_shared_memory(bench: Bench, tally: Tally) -> None:
    """Gives /dev/shm a container's default: one line that names it; without workers the run goes on."""
    shorter = (*LARGE, "--config.total_steps=2", "--config.eval_batch_size=40")
    workdir, reference = bench.workdir("small-shared-memory"), bench.finished(*shorter)
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if subprocess.run(probe, capture_output=True).returncode:
        raise Skipped("needs to mount a small /dev/shm")
    tally.done, tally.tried = f"a /dev/shm of {SHARED_MEBIBYTES} MiB, with a data worker", 1
    started = bench.start(workdir, *shorter, "--config.data.num_workers=1", program=IN_SMALL_SHARED_MEMORY)
    line = started.one_line_error()
    assert f"/dev/shm of {SHARED_MEBIBYTES} MiB" in line and "--shm-size" in line and "num_workers=0" in line, line
    tally.lose(started)
    bench.start(workdir, *shorter, "--config.data.num_workers=0", program=IN_SMALL_SHARED_MEMORY).end()
    tally.same(workdir, reference)


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("needs to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _size(folder: Path) -> int:
    """Returns the size of the newest checkpoint in bytes, in whole blocks."""
    newest = folder / str(max(int(path.name) for path in folder.iterdir() if path.name.isdigit()))
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in newest.rglob("*"))
