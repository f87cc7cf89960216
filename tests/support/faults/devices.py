"""Checkpoints that are saved on some devices and restored on others."""

from __future__ import annotations

import shutil
from typing import Final

from runs import reached

from faults.bench import Bench, Tally

# Sizes at which arrays are split (top_jax.sharding.SMALLEST_PART).
WIDE: Final = "--config.model.embed_dim=64"


def fits(bench: Bench) -> tuple[str, ...]:
    """Returns the flag, if one is needed, with which an evaluation batch splits over eight devices."""
    size = bench.config.eval_batch_size or bench.config.batch_size
    return () if size % 8 == 0 else (f"--config.eval_batch_size={-(-size // 8) * 8}",)


def _moved(bench: Bench, tally: Tally, before: int, after: int) -> None:
    flags, workdir = fits(bench), bench.workdir(f"{before}-then-{after}-devices")
    reference, step = bench.finished(), bench.total_steps // 2
    tally.done, tally.tried = f"SIGTERM at step {step} on {before} devices, started again on {after}", 1
    tally.lose(bench.terminate(workdir, reached(workdir, step), *flags, devices=before))
    started = bench.start(workdir, *flags, devices=after).end()
    assert f" images on {after} x " in started.out and (started.first_step() or 0) >= step
    tally.close(workdir, reference)


def eight_then_one(bench: Bench, tally: Tally) -> None:
    """Stops on eight devices, and goes on with one."""
    _moved(bench, tally, before=8, after=1)


def one_then_eight(bench: Bench, tally: Tally) -> None:
    """Stops on one device, and goes on with eight."""
    _moved(bench, tally, before=1, after=8)


def weights_in_parts(bench: Bench, tally: Tally) -> None:
    """Stops with FSDP over four devices, and goes on with two and with one."""
    flags = (*fits(bench), WIDE)
    reference, step = bench.finished(*flags), bench.total_steps // 2
    saved = bench.workdir("fsdp-4")
    tally.done = f"SIGTERM at step {step} with fsdp=4 on 4 devices, started again with fsdp=2 on 2, and on 1"
    tally.lose(bench.terminate(saved, reached(saved, step), *flags, "--config.fsdp=4", devices=4))
    newest = max(saved.glob("checkpoints/latest/*"), key=lambda path: int(path.name))
    for item in ("weights", "progress"):
        assert r"\"partition_spec\": [\"fsdp\"" in (newest / item / "_sharding").read_text(), "no array was split"
    for parts in (2, 1):
        tally.tried += 1
        workdir = shutil.copytree(saved, bench.workdir(f"fsdp-4-then-{parts}"))
        started = bench.start(workdir, *flags, f"--config.fsdp={parts}", devices=parts).end()
        assert (started.first_step() or 0) >= step
        tally.close(workdir, reference)
