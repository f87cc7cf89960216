"""metrics.jsonl, TensorBoard and the terminal."""

import io
import json
import struct

import pytest
from rich.console import Console

from top_jax.training.reporting import Reporter, Throughput, _item, _keep_until, logger
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


HISTORY = [{"kind": "train", "step": step, "loss": 1.25 / step} for step in range(1, 4)]
WRITTEN = "".join(json.dumps(line) + "\n" for line in HISTORY).encode()


@pytest.mark.slow
def test_every_flipped_bit_loses_at_most_its_line(tmp_path, monkeypatch):
    """The others stay as they were; what is lost is announced, and the old file kept."""
    file = tmp_path / "metrics.jsonl"
    copy = file.with_name("metrics.jsonl.damaged")
    lost, warnings = 0, []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warnings.append(text % values))
    for place in range(8 * len(WRITTEN)):
        damaged = bytearray(WRITTEN)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        copy.unlink(missing_ok=True)
        warnings.clear()
        _keep_until(file, 9)
        left = file.read_bytes()
        hit = WRITTEN[: place // 8].count(b"\n")
        others = [line for number, line in enumerate(WRITTEN.splitlines(True)) if number != hit]
        assert all(line in left for line in others), damaged
        assert left.count(b"\n") in (2, 3)
        if left.count(b"\n") == 2:
            lost += 1
            assert copy.read_bytes() == damaged and [f"line {hit + 1} first" in text for text in warnings] == [True]
        else:
            between = WRITTEN[place // 8] == ord("\n") and place // 8 < len(WRITTEN) - 1  # a break between two lines
            assert copy.exists() == bool(warnings) == between, damaged
    assert lost > 800


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"[1]\n" + WRITTEN, HISTORY),
        (b"\x00" * 4096 + b"\n" + WRITTEN, HISTORY),
        (b'{"kind": "train", "step": true}\n' + WRITTEN, HISTORY),
        (b'{"kind": 3, "step": 1}\n' + WRITTEN, HISTORY),
        (b'{"step": 1}\n' + WRITTEN, HISTORY),
        (b"[" * 100_000 + b"\n" + WRITTEN, HISTORY),
        (WRITTEN + b'{"kind": "train", "step": ' + b"9" * 5000 + b"}\n", HISTORY),
        (WRITTEN + b"\xff\xfe\n", HISTORY),
        (WRITTEN.replace(b"\n", b"\r\n"), HISTORY),
    ],
)
def test_damaged_metrics(tmp_path, damage, kept):
    """A second damage does not overwrite what was kept of the first."""
    file = tmp_path / "metrics.jsonl"
    for _ in range(2):
        file.write_bytes(damage)
        _keep_until(file, 9)
        assert lines(tmp_path) == kept
    copies = sorted(path.name for path in tmp_path.iterdir() if path != file)
    assert copies in ([], ["metrics.jsonl.damaged", "metrics.jsonl.damaged-2"])
    assert all((tmp_path / copy).read_bytes() == damage for copy in copies)
    assert bool(copies) == (damage.strip() != b"" and b"\r" not in damage)


def test_what_was_not_measured(tmp_path):
    """null in JSON, a dash for a person, nothing for TensorBoard."""
    report(tmp_path, 0, ("eval", 2, {"accuracy": 0.5, "images_per_second": None}))
    assert lines(tmp_path)[0]["images_per_second"] is None
    assert scalars(tmp_path / "tensorboard")[0] == {("eval/accuracy", 2): 0.5}
    assert (_item("images_per_second", None), _item("data_wait", None)) == ("- img/s", "waiting for data -")
    assert _item("ema_images_per_second", 0.04) == "0.04 img/s"


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
        measured = {name: value for name, value in line.items() if value is not None}
        assert measured and all(found[f"{kind}/{name}", step] == pytest.approx(measured[name]) for name in measured)


def test_what_a_run_prints(finished_run):
    """To a file or a pipe: one line per report, and the result."""
    out, err = ((finished_run / name).read_text() for name in ("stdout", "stderr"))
    assert err == ""  # no warnings of ours or of others
    first, hint, *reports = out.splitlines()
    assert first.startswith(f"{finished_run}: starting; 30 steps of 16 images on 1 x cpu; vim_tiny, ")
    assert "digits/train (1437 images to train, 360 to evaluate)" in first
    assert hint.startswith("no init_from: the pruned model starts from random weights.")
    assert sum(line.startswith("compiling") for line in reports) == 1
    assert sum(line.startswith("train ") for line in reports) == 30
    assert sum(line.startswith("eval ") for line in reports) == 3
    accuracy, cost, speed = reports[-3:]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (
        f"accuracy {summary['accuracy']:.2%}, averaged weights {summary['ema_accuracy']:.2%} at step 30, best "
        in accuracy
    )
    assert f"best {summary['best_accuracy']:.2%} at step {summary['best_step']}" in accuracy
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
    assert throughput.recent() == {"images_per_second": None, "data_wait": None}
    throughput.add(8)  # the first
    throughput.add(8)  # 2 s
    throughput.pause()
    throughput.resume()
    throughput.add(8)  # 1 s
    assert throughput.recent()["images_per_second"] == pytest.approx(16 / 3)
    assert throughput.recent() == {"images_per_second": None, "data_wait": None}
    assert throughput.overall()["images_per_second"] == pytest.approx(16 / 3)


def test_waiting_of_a_step_that_does_not_count(monkeypatch):
    """The start of the data workers, and a wait before a step that compiles, are no waiting of the steps that count."""
    clock = iter([0.0, 1.0, 31.0, 40.0, 41.0, 42.0, 44.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    throughput.resume()  # after the first evaluation
    with throughput.waiting():  # 30 s
        pass
    throughput.pause()  # compiles
    throughput.add(8)
    with throughput.waiting():  # 1 s
        pass
    throughput.add(8)  # 4 s
    assert throughput.overall() == {"images_per_second": 2.0, "data_wait": 0.25}
