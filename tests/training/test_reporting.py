"""metrics.jsonl, TensorBoard and the terminal."""

import io
import json
import struct

import pytest
from rich.console import Console

from top_jax.training.reporting import Reporter, Throughput
from top_jax.training.run_directory import RunDirectory

VALUES = {"loss": 1.5, "accuracy": 0.25}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def report(path, first_step, *reports):
    with Reporter(RunDirectory(path), first_step=first_step, total_steps=9) as reporter:
        for kind, step, values in reports:
            reporter.metrics(kind, step, values)


def test_what_a_kill_left_is_dropped(tmp_path):
    """Lines past the restored step, and a last one cut short, would be reported again."""
    report(tmp_path, 0, *(("train", step, VALUES) for step in (1, 2, 3)), ("eval", 2, VALUES))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    report(tmp_path, 2, ("train", 3, VALUES))
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert all(line["loss"] == 1.5 and line["accuracy"] == 0.25 for line in lines(tmp_path))


def test_a_step_is_reported_once(tmp_path):
    """An evaluation that is repeated after a restart is not; one that was missing is reported."""
    report(tmp_path, 0, ("train", 2, VALUES), ("eval", 2, VALUES))
    report(tmp_path, 2, ("eval", 2, VALUES))
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "eval"]
    (tmp_path / "b").mkdir()
    report(tmp_path / "b", 0, ("train", 2, VALUES))
    report(tmp_path / "b", 2, ("eval", 2, VALUES))
    assert [line["kind"] for line in lines(tmp_path / "b")] == ["train", "eval"]


def scalars(folder):
    """{(tag, step): value} of all event files, by tensorboardX's own protocol buffers; and where a restart purges."""
    from tensorboardX.proto.event_pb2 import Event

    found, purges = {}, []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            if event.HasField("session_log"):
                purges.append(event.step)
    return found, purges


def test_tensorboard(tmp_path):
    with Reporter(RunDirectory(tmp_path), first_step=4, total_steps=9) as reporter:
        reporter.metrics("train", 5, VALUES)
        reporter.metrics("eval", 6, {"accuracy": 0.5})
        found, purges = scalars(tmp_path / "tensorboard")  # written before the end: a kill loses nothing
    assert found == {("train/loss", 5): 1.5, ("train/accuracy", 5): 0.25, ("eval/accuracy", 6): 0.5}
    assert purges == [5]  # what an earlier start wrote from here on is void


def test_tensorboard_of_a_run(finished_run):
    found, _ = scalars(finished_run / "tensorboard")
    for line in lines(finished_run):
        kind, step = line.pop("kind"), line.pop("step")
        assert line and all(found[f"{kind}/{name}", step] == pytest.approx(value) for name, value in line.items())


def test_what_a_run_prints(finished_run):
    """To a file or a pipe: one line per report, and the result."""
    out, err = ((finished_run / name).read_text() for name in ("stdout", "stderr"))
    assert err == ""  # no warnings of ours or of others
    first, hint, *reports = out.splitlines()
    assert first.startswith(f"{finished_run}: starting; 30 steps of 16 images on 1 x cpu; vim_tiny, ")
    assert "digits/train (1437 images to train, 360 to evaluate)" in first
    assert hint.startswith("no init_from: the pruned model starts from random weights.")
    assert sum(line.startswith("train ") for line in reports) == 30
    assert sum(line.startswith("eval ") for line in reports) == 3
    accuracy, cost, speed = reports[-3:]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"accuracy {summary['accuracy']:.2%}, averaged weights {summary['ema_accuracy']:.2%}, best " in accuracy
    assert "360 images" in accuracy
    assert cost.startswith("tokens per stage 5 -> 3 (class token included); GMACs ")
    assert "(81.9%, published)" in cost and "all_directions)" in cost and "executed)" in cost
    assert (
        "img/s training (" in speed
        and "waiting for data)" in speed
        and "img/s evaluation on cpu" in speed
        and str(finished_run) in speed
    )


def test_bar(tmp_path, monkeypatch):
    """At a terminal of 80 columns a bar with loss, accuracy, img/s and the time left, on one line."""

    from top_jax.training import reporting

    screen = io.StringIO()
    monkeypatch.setattr(
        reporting, "Console", lambda: Console(file=screen, force_terminal=True, width=80, legacy_windows=False)
    )
    with Reporter(RunDirectory(tmp_path), first_step=0, total_steps=9000) as reporter:
        for step in range(1, 4):
            reporter.step(step, {"loss": 2.3456, "accuracy": 0.125, "images_per_second": 1234.5})
            reporter.metrics("train", step, VALUES)
        with reporter.evaluating(360) as advance:
            advance(100)
            reporter._progress.refresh()
        reporter.metrics("eval", 3, {"accuracy": 0.5, "images": 360, "unreadable": 0})
    shown = screen.getvalue()
    bar = next(line for line in shown.splitlines()[::-1] if "3/9000" in line)
    assert "loss 2.346  accuracy 12.5%  1,234 img/s" in bar and ":" in bar[-12:]
    assert "100/360" in shown
    assert "eval 3/9000  accuracy 50.0%\n" in shown and "train 3/9000" not in shown


def test_throughput(monkeypatch):
    """Steps alone: not the first, which compiles, nor what happens between pause and resume."""
    clock = iter([10.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    assert throughput.recent()["images_per_second"] == 0.0
    throughput.add(8)  # the first
    throughput.add(8)  # 2 s
    throughput.pause()
    throughput.resume()
    throughput.add(8)  # 1 s
    assert throughput.recent()["images_per_second"] == pytest.approx(16 / 3)
    assert throughput.recent()["images_per_second"] == 0.0
    assert throughput.overall()["images_per_second"] == pytest.approx(16 / 3)
