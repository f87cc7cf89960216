"""Reports a run: to metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from top_jax import distributed
from top_jax.build import backbone_of
from top_jax.config import RunConfig
from top_jax.files import new_file
from top_jax.optional import needs_extras
from top_jax.pruning import Reduction
from top_jax.training.prepare import Prepared
from top_jax.training.run_directory import RunDirectory
from top_jax.training.tensorboard import ScalarWriter
from top_jax.training.trackers import Tracking

with needs_extras("training"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Values = dict[str, float | int | None]
"""Numbers by name; None is one that was not measured."""


class Reporter:
    """Writes metrics immediately and advances a progress bar; a context manager.

    With several processes the first one reports; the others use a `Silence` (`make_reporter`).

    Args:
        run: where to write.
        first_step: steps before this start. Reports of later steps, by an earlier start, are dropped: the run will
            report them again.
        total_steps: length of the bar.
        tracking: a further service to report to; None reports to the run directory only.
    """

    def __init__(self, run: RunDirectory, *, first_step: int, total_steps: int, tracking: Tracking | None = None):
        self.console = Console()
        self._run = run
        self._tracking = tracking
        self._open(first_step)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # takes the rest of 80 columns
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
        """Goes back to the state after `step` steps, and drops the reports of later steps."""
        self._close()
        self._open(step)

    def step(self, step: int, values: Values) -> None:
        """Advances the bar and shows `values` next to it."""
        self._progress.update(self._training, completed=step, status=_readable(values))

    @contextlib.contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], None]]:
        """Shows a second bar, for an evaluation; yields the function that advances it by a number of images."""
        task = self._progress.add_task("eval", total=images, status="")
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)

    def reported(self, kind: str) -> Values | None:
        """Returns what an earlier start reported for the step from which this one starts."""
        return self._reported.get(kind)

    def metrics(self, kind: str, step: int, values: Values) -> None:
        """Reports metrics of the state after `step` steps, unless an earlier start has done so."""
        if kind != "train" or not self.console.is_terminal:
            self.say(f"{kind} {step}/{self._total_steps}  {_readable(values)}")
        if step == self._first_step and kind in self._reported:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())  # a checkpoint of this step must not outlive its line
        tagged = {f"{kind}/{name}": value for name, value in values.items()}
        self._board.write(step, tagged)
        if self._tracking is not None:
            self._tracking.log(step, tagged)

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._close()
        if self._tracking is not None:
            self._tracking.close()

    def _open(self, step: int) -> None:
        self._reported = _keep_until(self._run.metrics, step)
        self._first_step = step
        self._lines = self._run.metrics.open("a")
        self._board = ScalarWriter(self._run.tensorboard, purge_step=step + 1)

    def _close(self) -> None:
        self._board.close()
        self._lines.close()


class Silence:
    """Reports nothing: used by every process except the first."""

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def step(self, step: int, values: Values) -> None:
        """Does nothing."""

    @contextlib.contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that does nothing."""
        yield lambda count: None

    def reported(self, kind: str) -> None:
        """Returns None: only the first process has the reports."""

    def metrics(self, kind: str, step: int, values: Values) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

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
        self._waited = self._total_waited = self._waited_in_step = 0.0
        self._since: float | None = None

    def add(self, images: int) -> None:
        """Counts a completed step of `images` images."""
        now = time.perf_counter()
        if self._since is not None:
            self._images += images
            self._seconds += now - self._since
            self._waited += self._waited_in_step
        self._since, self._waited_in_step = now, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_in_step += time.perf_counter() - start

    def pause(self) -> None:
        """Stops the clock until `resume`; the step in progress does not count."""
        self._since = None

    def resume(self) -> None:
        """Starts the clock again, before a compiled step."""
        self._since, self._waited_in_step = time.perf_counter(), 0.0

    def recent(self) -> Values:
        """Returns `images_per_second` and `data_wait` since the last call; None if no step was timed."""
        rates = _rates(self._images, self._seconds, self._waited)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._total_waited += self._waited
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        return rates

    def overall(self) -> Values:
        """Returns `images_per_second` and `data_wait` since the start."""
        seconds, waited = self._total_seconds + self._seconds, self._total_waited + self._waited
        return _rates(self._total_images + self._images, seconds, waited)


def _rates(images: int, seconds: float, waited: float) -> Values:
    if not seconds:
        return {"images_per_second": None, "data_wait": None}
    return {"images_per_second": images / seconds, "data_wait": min(1.0, waited / seconds)}


def _keep_until(file: Path, step: int) -> dict[str, Values]:
    """Removes the lines of steps after `step` from metrics.jsonl, and those that cannot be read.

    If a line is damaged, a copy of the old file is kept, except for a last line that a kill cut short.

    Returns:
        The reports of `step`, by kind.
    """
    if not file.is_file():
        return {}
    content = file.read_bytes()
    kept, damaged, at_step = [], [], {}
    for number, line in enumerate(content.split(b"\n"), 1):
        found, broken = _reports_in(line)
        if broken and not (number == content.count(b"\n") + 1 and not found):
            damaged.append(number)
        for text, report in found:
            if report["step"] <= step:
                kept.append(text + "\n")
            if report["step"] == step:
                at_step[report["kind"]] = {
                    name: value for name, value in report.items() if name not in ("kind", "step")
                }
    if damaged:
        copy = next(path for path in _copies_of(file) if not path.exists())
        with new_file(copy) as temporary:
            temporary.write_bytes(content)
        logger.warning(
            "%d line%s of %s cannot be read (line %d first) and %s left out; the old file is kept as %s",
            *(len(damaged), "s" * (len(damaged) > 1), file, damaged[0], "are" if len(damaged) > 1 else "is", copy.name),
        )
    with new_file(file) as temporary:
        temporary.write_bytes("".join(kept).encode())
    return at_step


def _reports_in(line: bytes) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
    """Returns the reports in a line, each with its text, and whether the line contains anything else.

    A line has two reports if the line break between them was damaged.
    """
    decoder, found, at = json.JSONDecoder(), [], 0
    text = line.decode(errors="surrogateescape")
    while at < len(text):
        try:
            report, end = decoder.raw_decode(text, at)
            written = text[at:end]
            written.encode()  # raises for bytes that are not UTF-8
        except (ValueError, RecursionError):
            return found, True
        if not (isinstance(report, dict) and type(report.get("step")) is int and isinstance(report.get("kind"), str)):
            return found, True
        found.append((written, report))
        at = end + 1
    return found, len(found) > 1


def _copies_of(file: Path) -> Iterator[Path]:
    yield file.with_name(f"{file.name}.damaged")
    yield from (file.with_name(f"{file.name}.damaged-{number}") for number in itertools.count(2))


def _readable(values: Values) -> str:
    """Formats numbers for the terminal, without redundant ones."""
    shown = {n: v for n, v in values.items() if not n.endswith("images") and (v != 0 or not n.endswith("unreadable"))}
    return "  ".join(_item(name, value) for name, value in shown.items())


def _item(name: str, value: float | int | None) -> str:
    if name.endswith("images_per_second"):
        return f"{_speed(value)} img/s"
    if name == "data_wait":
        return f"waiting for data {_share(value)}"
    label = (
        name.replace("ema_", "averaged ").replace("accuracy_top5", "top-5").replace("miou", "mIoU").replace("_", " ")
    )
    return f"{label} {_share(value, 1)}" if "accuracy" in name or "miou" in name else f"{label} {_short(value)}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _short(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"


def make_reporter(
    run: RunDirectory, *, first_step: int, total_steps: int, config: RunConfig | None = None
) -> Reporter | Silence:
    """Returns the reporter of this process; arguments as for `Reporter`.

    Raises:
        InputError: the tracker of `config` does not start.
    """
    with distributed.together():
        if not distributed.is_primary():
            return Silence()
        tracking = None if config is None or config.tracker is None else Tracking(run, config)
        return Reporter(run, first_step=first_step, total_steps=total_steps, tracking=tracking)


def announce(prepared: Prepared, reporter: Reporter | Silence, first_step: int) -> None:
    """Prints the run's directory, length, devices, model and data, and warns of a likely mistake."""
    plan, config = prepared.plan, prepared.plan.config
    train_source, eval_source = prepared.train_source, prepared.eval_source
    start = f"going on after step {first_step}" if first_step else "starting"
    scan = "" if plan.model.scan_implementation is None else f", {plan.model.scan_implementation} scan"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    parts = f", weights in {config.fsdp} parts" if config.fsdp > 1 else ""
    reporter.say(
        f"{prepared.run.path}: {start}; {plan.total_steps} steps of {config.batch_size} images on "
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}{processes}{parts}; {config.model.name}{scan}; "
        f"{train_source.name} ({len(train_source)} images to train, {len(eval_source)} to evaluate)"
    )
    if plan.model.reduction.after_blocks and config.init_from is None and not first_step:
        reporter.say(
            "no init_from: the pruned model starts from random weights. The paper fine-tunes dense ones: "
            "--config.init_from=RUN_DIRECTORY or an official file (.pth, .safetensors)"
        )
    if len(plan.stages) > 1:
        stages = ", ".join(f"{_ratios(stage.reduction)} from step {stage.first_step}" for stage in plan.stages)
        reporter.say(f"keep ratio {stages}; evaluations use the last")


def conclusion(prepared: Prepared, summary: dict[str, Any]) -> list[str]:
    """Returns the final result of a run as lines of text.

    Raises:
        KeyError, TypeError, ValueError: the summary has another form.
    """
    stages = " -> ".join(str(n) for n in dict.fromkeys(summary["tokens_per_block"]))
    has_class_token = summary["tokens_per_block"][0] > backbone_of(prepared.plan.model).config.num_patches
    task = prepared.plan.task
    costs = f"GMACs {_costs(summary, 'gmacs')}"
    if "backbone_gmacs" in summary:
        whole, dense = (summary[key]["published"] for key in ("gmacs", "dense_gmacs"))
        costs = f"GMACs of the backbone {_costs(summary, 'backbone_gmacs')}; with the heads {whole:.3g} of {dense:.3g}"
    average = f", averaged weights {summary[f'ema_{task.score}']:.2%}" if f"ema_{task.score}" in summary else ""
    best = summary.get("best_step")  # summaries of older releases have none
    best = "" if best is None else f" at step {best}, which evaluate takes by default"
    skipped = [int(batch) for batch in summary["skipped_batches"]]
    speed = summary["images_per_second"]  # None if there was only one batch, during which the step compiles
    evaluation = "" if speed is None else f", {_speed(speed)} img/s evaluation"
    return [
        f"{task.title} {summary[task.score]:.2%}{average} at step {int(summary['steps'])}, best "
        f"{summary[f'best_{task.score}']:.2%}{best}; {int(summary['images'])} images",
        f"tokens per stage {stages}{' (class token included)' * has_class_token}; {costs}",
        *([f"skipped, because they gave numbers that are not finite: batches {skipped}"] if skipped else []),
        f"{_speed(summary['train_images_per_second'])} img/s training ({_share(summary['data_wait'])} of the time "
        f"waiting for data){evaluation} on {summary['device']}; everything is in {prepared.run.path}",
    ]


def _costs(summary: dict[str, Any], key: str) -> str:
    """Formats multiply-accumulates in each convention, with their share of the dense model's."""
    dense = summary[f"dense_{key}"]
    return ", ".join(
        f"{g:.3g} of {dense[name]:.3g} ({g / dense[name]:.1%}, {name})" for name, g in summary[key].items()
    )


def _ratios(reduction: Reduction) -> str:
    """Formats the distinct keep ratios, such as 1/0.9; a dense model keeps everything."""
    return "/".join(f"{ratio:.3g}" for ratio in dict.fromkeys(reduction.ratios)) or "1"
