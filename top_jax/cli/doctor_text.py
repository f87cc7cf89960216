"""Prints the report of `top-jax doctor`, one function per part."""

from __future__ import annotations

from typing import Any

from top_jax.cli import terminal
from top_jax.values import counted

UNREADABLE_SHOWN = 10


def show_installation(report: dict[str, Any]) -> None:
    """Prints versions, devices and implementations of the scan."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    git = f" (git {report['git']})" if report["git"] else ""
    terminal.heading("installation")
    _say(f"top_jax {report['top_jax']}{git}, Python {report['python']}")
    _say(packages)
    _say(f"devices: {report['devices']} x {report['device']} ({report['platform']})")
    scan = report["selective_scan"]
    _say(f"selective scan: auto is {scan['auto']} ({scan['why']})" + (f"; {scan['fix']}" if scan["fix"] else ""))
    for name, state in scan["implementations"].items():
        _say(f"  {name:16}  {state}")
    for need in report["missing"]:
        _say(f"not installed, needed for {need}")


def show_data(data: dict[str, Any]) -> None:
    """Prints the contents of the splits, and what is missing or wrong."""
    terminal.heading(f"data: {data['train']['source']} and {data['eval']['source']}")
    splits = [data["train"], data["eval"]]
    table = terminal.Table("", "train", "eval")
    table.add_row("images", *[f"{found['images']:,}" for found in splits])
    table.add_row("classes", *[f"{found['classes']:,}" for found in splits])
    table.add_row("labels read", *[f"{found['labels_read']:,}" for found in splits])
    table.add_row("images per class", *[f"{f['smallest_class']:,} to {f['largest_class']:,}" for f in splits])
    if splits[0]["ignored"] is not None:
        table.add_row("ignored pixels", *[f"{found['ignored']:.1%}" for found in splits])
    table.add_row("decoded", *[f"{f['decoded'] - f['decoded_unreadable']} of {f['decoded']} tried" for f in splits])
    table.add_row("shorter side", *[_sides(found["shorter_side"]) for found in splits])
    table.show()
    for split in ("train", "eval"):
        _show_gaps(split, data[split])
    for note in data["notes"]:
        _say(note)
    for problem in data["problems"]:
        _say(f"training would fail: {problem}")


def show_loader(loader: dict[str, Any]) -> None:
    """Prints the rates of the loader's stages and of the whole pipeline."""
    from top_jax.data.loader_speed import number

    threads = counted(loader["threads"], "thread")
    where = "in the training process"
    if workers := loader["workers"]:
        where = f"in each of {workers} worker processes" if workers > 1 else "in one worker process"
    terminal.heading(f"loader: {counted(loader['cores'], 'core')}; {threads} {where}")
    table = terminal.Table("one thread, training images", "images/s per core", "ms per image")
    for name, rate in loader["stages_in_one_thread"].items():
        table.add_row(name, number(rate["images_per_second"]), f"{1e3 * rate['seconds'] / rate['images']:.2f}")
    table.show()
    pipeline = loader["pipeline"]
    smaller = pipeline["batch_size"] != pipeline["configured_batch_size"]
    instead = f" (the run's {pipeline['configured_batch_size']:,} would take too long to measure)" if smaller else ""
    _say(
        f"the whole pipeline: {number(pipeline['images_per_second'])} images/s, over {pipeline['seconds']:.1f} s in "
        f"batches of {pipeline['batch_size']:,}{instead}; its first batch took {pipeline['start_seconds']:.1f} s"
    )


def show_step(step: dict[str, Any]) -> None:
    """Prints the time and memory of the training step."""
    from top_jax.data.loader_speed import number

    teacher = " with its teacher" if step["with_teacher"] else ""
    terminal.heading(
        f"training step: {step['model']}{teacher}, {step['dtype']}, on {step['devices']} x {step['device']}"
    )
    smaller = step["batch_size"] != step["configured_batch_size"]
    instead = f" (the run's has {step['configured_batch_size']:,})" if smaller else ""
    _say(
        f"{number(step['images_per_second'])} images/s: {number(1e3 * step['seconds'])} ms for a batch of "
        f"{step['batch_size']:,}{instead}, the median of {step['steps']} steps on random pixels; compiled in "
        f"{step['compile_seconds']:.0f} s"
    )
    if memory := step["memory"]:
        parts = ", ".join(f"{_size(memory[name])} {name}" for name in ("arguments", "outputs", "temporaries"))
        _say(
            f"memory on each device, as XLA plans this step: {_size(memory['total'])} = {parts}, less "
            f"{_size(memory['donated'])} of outputs that reuse donated arguments"
        )


def show_verdict(verdict: dict[str, Any]) -> None:
    """Prints the conclusion."""
    terminal.heading("verdict")
    _say(verdict["text"])


def _show_gaps(split: str, found: dict[str, Any]) -> None:
    """Prints the classes without images, and the images and label maps that cannot be read or used."""
    if empty := found["classes_without_images"]:
        of = "" if found["labels_read"] == found["images"] else f" among the {found['labels_read']:,} images read"
        _say(f"{split}: {empty:,} of {found['classes']:,} classes have no image{of}")
    for kind in ("unreadable", "refused"):
        for line in found[kind][:UNREADABLE_SHOWN]:
            _say(f"{split}: {kind}: {line}")
        if (more := len(found[kind]) - UNREADABLE_SHOWN) > 0:
            _say(f"{split}: and {more} more, all of them named in the --json file")


def _sides(sides: tuple[int, int, int] | None) -> str:
    if sides is None:
        return "-"
    least, median, most = sides
    return f"{least:,} px" if least == most else f"{least:,} to {most:,} px, median {median:,}"


def _size(count: int) -> str:
    """Returns a count of bytes as text, in decimal units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def _say(text: str) -> None:
    print(f"  {text}")
