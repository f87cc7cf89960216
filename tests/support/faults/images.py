"""Images that cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import runs

from faults.bench import Bench, Tally


def unreadable(bench: Bench, tally: Tally) -> None:
    """Damages images: each is named and left out in training and evaluation; nothing else changes."""
    intact, broken = bench.workdir("images"), bench.workdir("images-some-unreadable")
    train = bench.total_steps * bench.config.batch_size // 2  # so that each is drawn
    write_digits(intact, train=min(train, 1000), test=200)
    shutil.copytree(intact, broken)
    half, empty, text, half_of_test = damage_some(broken)
    tally.done, tally.tried = "PNGs: one cut in half, one empty, one a text, one of the test images cut in half", 4
    reference = bench.finished(*flags(intact))
    workdir = bench.workdir("some-unreadable")
    started = bench.start(workdir, *flags(broken)).end()
    named = [path for path in (half, empty, text, half_of_test) if str(path) in started.err]
    tally.survived = len(named)
    assert len(named) == 4, f"{4 - len(named)} were not named: {started.err[-1000:]}"
    assert "Traceback" not in started.err
    evaluated = runs.summary(workdir)
    assert (evaluated["images"], evaluated["unreadable"]) == (199, 1)
    tally.compare(workdir, reference)
    tally.notes.append("compared with a run in which all can be read")


def flags(folder: Path) -> tuple[str, ...]:
    """Returns the flags that run the config on these images."""
    changes = ("source=image_folder", f"data_dir={folder}", "train_split=train", "eval_split=test")
    return "--config.model.num_classes=10", *(f"--config.data.{change}" for change in changes)


def write_digits(folder: Path, *, train: int, test: int) -> None:
    """Writes the bundled digits as an image folder of PNGs."""
    from PIL import Image
    from sklearn import datasets

    digits = datasets.load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if number >= train + test:
            break
        place = folder / ("train" if number < train else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).resize((64, 64)).save(place / f"{number}.png")


def damage_some(folder: Path) -> tuple[Path, Path, Path, Path]:
    """Damages three training images and one test image."""
    train = sorted(folder.glob("train/*/*.png"))
    half, empty, text = train[len(train) // 5 :: len(train) // 4][:3]
    half_of_test = sorted(folder.glob("test/*/*.png"))[50]
    for path in (half, half_of_test):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("no image")
    return half, empty, text, half_of_test
