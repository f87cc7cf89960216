"""What a run tells: metrics.jsonl, TensorBoard, and a person at the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from top_jax.training.run_directory import RunDirectory, write_text


class Reporter:
    """Writes metrics as they come and moves a progress bar; a context manager.

    Args:
        run: where to write.
        first_step: steps done before this start; what an earlier start reported beyond them is dropped, because the
            run will report it again.
        total_steps: length of the bar.
    """

    def __init__(self, run: RunDirectory, *, first_step: int, total_steps: int):
        self.console = Console()
        _drop_after(run.metrics, first_step)
        self._lines = run.metrics.open("a")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._total_steps = total_steps
        self._training = self._progress.add_task("train", total=total_steps, completed=first_step, status="")

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._training, completed=step)

    def metrics(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Reports numbers of the state after `step` steps, in all places."""
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())  # a checkpoint of this step must not outlive its line
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self._progress.update(self._training, status=text if kind == "train" else "")
        if kind != "train" or not self.console.is_terminal:
            self.console.print(f"{kind} {step}/{self._total_steps}  {text}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._board.close()
        self._lines.close()


class Throughput:
    """Images per second of the training steps alone, without evaluations, checkpoints and the first, compiling step."""

    def __init__(self) -> None:
        self._images = self._total_images = 0
        self._seconds = self._total_seconds = 0.0
        self._since: float | None = None

    def add(self, images: int) -> None:
        """A step of so many images has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._images += images
            self._seconds += now - self._since
        self._since = now

    def pause(self) -> None:
        """What happens until `resume` is no training step."""
        self._since = None

    def resume(self) -> None:
        """Training goes on, compiled."""
        self._since = time.perf_counter()

    def recent(self) -> float:
        """Since the last call; 0.0 where no step was timed."""
        rate = self._images / self._seconds if self._seconds else 0.0
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._images, self._seconds = 0, 0.0
        return rate

    def overall(self) -> float:
        """Since the start; 0.0 where no step was timed."""
        seconds = self._total_seconds + self._seconds
        return (self._total_images + self._images) / seconds if seconds else 0.0


def _drop_after(file: Path, step: int) -> None:
    """Removes lines of later steps, and a last line that a kill cut short."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_text(file, "".join(kept))


def _short(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"
