"""Shows this installation, its devices and the scan that it would run; with --data, checks a run's data and loader.

top-jax doctor [--json FILE]
top-jax doctor --data --config configs/vim_t.py --config.data.data_dir=DIR [--nostep] [--json FILE]

--data counts images and classes, decodes a sample, measures the loader, and compares its speed with the run's own
training step. The exit status is 0 if the run could start on this data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from absl import flags

from top_jax import files
from top_jax.cli import config_file, doctor_text, runner, shared_flags, terminal
from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.optional import EXTRAS, installed

# What the extras of pyproject.toml are for; those for a GPU are reported with the scan.
_PURPOSES = {
    "train": "config files, training, evaluation and datasets",
    "figures": "pictures of `visualize` and `ablate`",
    "export": "`export`",
    "hub": "weights by name from the Hugging Face Hub",
    "convert": ".pth files (torch) and .safetensors files (safetensors)",
    "hf": "data from Hugging Face datasets",
}

_DATA = flags.DEFINE_boolean("data", False, "Check the config's data, and measure its loader and training step.")
_CONFIG = shared_flags.define_config(
    required=False, help_text=f"{config_file.CONFIG_HELP} By default the bundled digits."
)
_SAMPLE = flags.DEFINE_integer("sample", 64, "Images of each split to decode, evenly spread.", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 2.0, "Seconds per measurement; the whole pipeline takes twice as long.", lower_bound=0.0
)
_STEP = flags.DEFINE_boolean("step", True, "Time the training step; a large model takes a minute to compile on a CPU.")
_STEP_BATCH = flags.DEFINE_integer(
    "step_batch_size",
    None,
    "Images in the timed step, over all devices; by default the run's, on a CPU at most 8 per device.",
    lower_bound=1,
)
_JSON = flags.DEFINE_string("json", None, "File for the report.")


def main(arguments: list[str]) -> None:
    """Collects the report, prints each part when it is known, and writes the whole."""
    runner.no_more(arguments)
    runner.check_json(_JSON.value)
    config = RunConfig() if _CONFIG.value is None else shared_flags.read_config(_CONFIG)
    sources = open_splits(config) if _DATA.value else {}  # raises if there is no data, before anything is printed
    report: dict[str, Any] = installation()
    doctor_text.show_installation(report)
    if sources:
        report["data"] = inspect(config, sources)
        doctor_text.show_data(report["data"])
        if report["data"]["train"]["shorter_side"] is not None and not report["data"]["train"]["refused"]:
            report["loader"] = measure_loader(config, sources["train"])
            doctor_text.show_loader(report["loader"])
        if _STEP.value:
            report["step"] = time_step(config)
            doctor_text.show_step(report["step"])
        if "loader" in report:
            report["verdict"] = compare(report)
            doctor_text.show_verdict(report["verdict"])
    files.save_json(_JSON.value, report)
    if sources and (problems := report["data"]["problems"]):
        more = f" ({len(problems) - 1} more above)" if len(problems) > 1 else ""
        raise InputError(f"training would fail: {problems[0]}{more}")


def installation() -> dict[str, Any]:
    """Returns versions, devices, the scan that `auto` chooses, and which optional packages are missing."""
    from top_jax.environment import environment
    from top_jax.ops.implementations import IMPLEMENTATIONS, choose, obstacle

    choice = choose()
    return {
        **environment(),
        "selective_scan": {
            "auto": choice.name,
            "why": choice.why,
            "fix": choice.fix,
            "implementations": {name: obstacle(name) or "runs here" for name in IMPLEMENTATIONS if name != "auto"},
        },
        "missing": list(_missing_packages()),
    }


def _missing_packages() -> Iterator[str]:
    """Yields the features that cannot be used, each with its missing packages and the command that installs them."""
    for extra, purpose in _PURPOSES.items():
        packages = [name for name, of in EXTRAS.items() if of == extra and not installed(name)]
        if packages:
            yield f"{purpose} ({', '.join(packages)}): pip install 'top-jax[{extra}]'"


def open_splits(config: RunConfig) -> dict[str, Any]:
    """Returns the sources "train" and "eval".

    Raises:
        InputError: there is no such data, or the model's sizes are wrong.
    """
    from top_jax.data import open_source

    _img_size(config)
    return {split: open_source(config.data, train=split == "train") for split in ("train", "eval")}


def inspect(config: RunConfig, sources: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of the splits, what they lack (`notes`), and why training would fail (`problems`)."""
    from top_jax.data import inspection

    dataset, notes, splits = inspection.published_dataset(config.data, sources["train"]), [], {}
    for split, source in sources.items():
        train = split == "train"
        official = None if dataset is None else inspection.published_images(dataset, config.data, train=train)
        total = inspection.records_to_read(source, _SAMPLE.value)
        with terminal.progress(f"looking at {source.name}", total) as advance:
            found = inspection.inspect_split(source, sample=_SAMPLE.value, config=config.data, on_image=advance)
        splits[split] = {**dataclasses.asdict(found), "official_images": official}
        if dataset is not None and official is not None:
            notes.append(inspection.completeness(split, found.images, dataset, official))
        if dataset is not None and found.classes != dataset.classes:
            notes.append(f"{split} has {found.classes:,} classes, and {dataset.name} {dataset.classes:,}")
    if dataset is None and inspection.has_wnid_classes(sources["train"]):
        notes.append("its classes are named like ImageNet's, but are not 1,000: not compared with ImageNet-1K")
    return {
        "dataset": None if dataset is None else dataset.name,
        **splits,
        "notes": notes,
        "problems": list(_problems(config, sources, splits)),
    }


def measure_loader(config: RunConfig, source: Any) -> dict[str, Any]:
    """Returns the rates of the stages in one thread, and of the whole pipeline as the run starts it."""
    from top_jax.data import loader_speed as speed

    size, at_work = _img_size(config), speed.lanes(config.data)
    rates: dict[str, speed.Speed] = {}
    for name, stage in speed.stages(source, config.data, config.augment, size).items():
        with terminal.status(f"measuring {name}"):
            start = sum(rate.images for rate in rates.values())
            rates[name] = speed.measure_stage(stage, len(source), seconds=_SECONDS.value, start=start)
    slowest = min(rate.images_per_second for rate in rates.values())
    batch_size = speed.measuring_batch_size(config.batch_size, images=len(source), images_per_second=slowest)
    with terminal.status("measuring the whole pipeline"):
        pipeline, start_seconds = speed.measure_pipeline(
            source, config.data, config.augment, size, batch_size=batch_size, seconds=2 * _SECONDS.value
        )
    return {
        **at_work._asdict(),
        "stages_in_one_thread": {name: rate.to_dict() for name, rate in rates.items()},
        "pipeline": {
            **pipeline.to_dict(),
            "batch_size": batch_size,
            "start_seconds": start_seconds,
            "configured_batch_size": config.batch_size,
        },
    }


def time_step(config: RunConfig) -> dict[str, Any]:
    """Returns the time and memory of the run's own training step, on random pixels."""
    from top_jax.training.step_speed import measure_step

    with terminal.status(f"compiling and timing the training step of {config.model.name}"):
        timed = measure_step(config, batch_size=_STEP_BATCH.value)
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        **dataclasses.asdict(timed),
        "images_per_second": timed.images_per_second,
        "configured_batch_size": config.batch_size,
        "with_teacher": config.distillation.teacher is not None,
    }


def compare(report: dict[str, Any]) -> dict[str, Any]:
    """Returns whether the loader is fast enough for the step; without a timed step, only the loader's rate."""
    from top_jax.data import loader_speed as speed

    loader = report["loader"]
    at_work = speed.Lanes(*(loader[name] for name in speed.Lanes._fields))
    given = loader["pipeline"]["images_per_second"]
    if "step" not in report:
        return {"text": f"{speed.loader_rate(given, at_work)}; the step was not timed"}
    found = speed.verdict(given, report["step"]["images_per_second"], at_work)
    shared = (
        "; each was measured alone, but in training they share the CPU's cores" if report["platform"] == "cpu" else ""
    )
    return {**found._asdict(), "text": found.text + shared}


def _problems(config: RunConfig, sources: dict[str, Any], splits: dict[str, Any]) -> Iterator[str]:
    """Yields the reasons why training on this data would fail."""
    from top_jax.data import train_batches

    for split, found in splits.items():
        if found["shorter_side"] is None:
            yield (
                f"no image of {found['source']} can be read ({found['decoded']} tried), such as "
                f"{found['unreadable'][0]}"
            )
        elif found["unreadable"] and config.data.on_corrupt == "raise":
            yield (
                f"{split} has unreadable images, such as {found['unreadable'][0]}; replace them, or pass "
                "--config.data.on_corrupt=skip"
            )
        if found["refused"]:
            yield found["refused"][0].rstrip(".")
        if found["classes"] != config.model.num_classes:
            yield (
                f"{found['source']} has {found['classes']} classes and the model {config.model.num_classes}; "
                f"set --config.model.num_classes={found['classes']}"
            )
    try:
        train_batches(
            sources["train"],
            config.data,
            augment=config.augment,
            img_size=_img_size(config),
            batch_size=config.batch_size,
            seed=config.seed,
        ).close()
    except InputError as error:
        yield str(error).rstrip(".")


def _img_size(config: RunConfig) -> tuple[int, int]:
    from top_jax.build import crop_size

    return crop_size(config)


if __name__ == "__main__":
    runner.run(main)
