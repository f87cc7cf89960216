"""What a run tells: metrics.jsonl, TensorBoard, and a person at the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from top_jax.files import write_text
from top_jax.training.run_directory import RunDirectory
from top_jax.training.tensorboard import ScalarWriter


class Reporter:
    """Writes metrics as they come and moves a progress bar; a context manager.

    Of several processes the first reports; the others make a `Silence`.

    Args:
        run: where to write.
        first_step: steps done before this start; what an earlier start reported beyond them is dropped, because the
            run will report it again.
        total_steps: length of the bar.
    """

    def __init__(self, run: RunDirectory, *, first_step: int, total_steps: int):
        self.console = Console()
        self._run = run
        self._open(first_step)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the others leave: a line must fit into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self._total_steps = total_steps
        self._training = self._progress.add_task("train", total=total_steps, completed=first_step, status="")

    def rewind(self, step: int) -> None:
        """Goes back to where `step` steps were done: what has been reported of later ones is void."""
        self._close()
        self._open(step)

    def step(self, step: int, values: dict[str, float | int]) -> None:
        """Moves the bar; `values` stand beside it."""
        self._progress.update(self._training, completed=step, status=_readable(values))

    @contextlib.contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], None]]:
        """A second bar, of an evaluation; yields the function that moves it on by so many images."""
        task = self._progress.add_task("eval", total=images, status="")
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)

    def metrics(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        """Reports numbers of the state after `step` steps, in all places; once, even if another start already did."""
        if kind != "train" or not self.console.is_terminal:
            self.say(f"{kind} {step}/{self._total_steps}  {_readable(values)}")
        if step == self._first_step and kind in self._reported:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())  # a checkpoint of this step must not outlive its line
        self._board.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._close()

    def _open(self, step: int) -> None:
        _drop_after(self._run.metrics, step)
        self._reported = _kinds_at(self._run.metrics, step)
        self._first_step = step
        self._lines = self._run.metrics.open("a")
        self._board = ScalarWriter(self._run.tensorboard, purge_step=step + 1)

    def _close(self) -> None:
        self._board.close()
        self._lines.close()


class Silence:
    """The Reporter of every process but the first."""

    def rewind(self, step: int) -> None:
        """Nothing to take back."""

    def step(self, step: int, values: dict[str, float | int]) -> None:
        """Nothing to show."""

    @contextlib.contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], None]]:
        """A function that does nothing."""
        yield lambda count: None

    def metrics(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        """Nothing to write."""

    def say(self, text: str) -> None:
        """Nothing to say."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Throughput:
    """Images per second of the training steps alone, and the share of that time in which they waited for data.

    Evaluations, checkpoints and steps that compile do not count.
    """

    def __init__(self) -> None:
        self._images = self._total_images = 0
        self._seconds = self._total_seconds = 0.0
        self._waited = self._total_waited = 0.0
        self._since: float | None = None

    def add(self, images: int) -> None:
        """A step of so many images has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._images += images
            self._seconds += now - self._since
        self._since = now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the next batch is not there yet."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._waited += time.perf_counter() - start

    def pause(self) -> None:
        """What happens until `resume` is no training step."""
        self._since = None

    def resume(self) -> None:
        """Training goes on, compiled."""
        self._since = time.perf_counter()

    def recent(self) -> dict[str, float]:
        """`images_per_second` and `data_wait` since the last call; 0.0 where no step was timed."""
        rates = _rates(self._images, self._seconds, self._waited)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._total_waited += self._waited
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        return rates

    def overall(self) -> dict[str, float]:
        """The same since the start."""
        seconds, waited = self._total_seconds + self._seconds, self._total_waited + self._waited
        return _rates(self._total_images + self._images, seconds, waited)


def _rates(images: int, seconds: float, waited: float) -> dict[str, float]:
    if not seconds:
        return {"images_per_second": 0.0, "data_wait": 0.0}
    return {"images_per_second": images / seconds, "data_wait": min(1.0, waited / seconds)}


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


def _kinds_at(file: Path, step: int) -> set[str]:
    """What has been reported of a step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {line["kind"] for line in lines if line["step"] == step}


def _readable(values: dict[str, float | int]) -> str:
    """Numbers as a person reads them, without those that say nothing new."""
    told = {n: v for n, v in values.items() if not n.endswith("images") and (v or not n.endswith("unreadable"))}
    return "  ".join(_item(name, value) for name, value in told.items())


def _item(name: str, value: float | int) -> str:
    if name.endswith("images_per_second"):
        return f"{value:,.0f} img/s"
    if name == "data_wait":
        return f"waiting for data {value:.0%}"
    label = name.replace("ema_", "averaged ").replace("accuracy_top5", "top-5").replace("_", " ")
    return f"{label} {value:.1%}" if "accuracy" in name else f"{label} {_short(value)}"


def _short(value: float | int) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"
