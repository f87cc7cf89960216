"""The directory of one run: its files, and checks of which run owns it.

config.json        the run's config; a run with another config is refused
data.json          numbers of images of both splits, and the names of the classes in the order of the labels
environment.json   versions, devices and git revision of the last start
metrics.jsonl      reported numbers, one line per report
tensorboard/       the same numbers for TensorBoard
checkpoints/       latest/, best/, teacher/ and damaged/ (`top_jax.training.checkpoints`)
wandb.json         the id of the run at Weights & Biases, with config.tracker=wandb
summary.json       the result of a finished run
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from flax.traverse_util import flatten_dict

from top_jax import distributed, files, values
from top_jax.build import build_reduction, build_sizes, segmenter_sizes
from top_jax.config import RunConfig
from top_jax.environment import environment
from top_jax.errors import InputError, RunError
from top_jax.training.class_names import first_difference

logger = logging.getLogger(__name__)

DataFacts = dict[str, Any]
"""Content of data.json. `train`, `eval`: {"name", "images"} of a split. `class_names`: in the order of the labels."""

# Settings that may change when a run is resumed. They do not change its results, except that fsdp, like the number of
# devices, changes the order of sums.
FREE_TO_CHANGE: Final = (
    "log_every",
    "checkpoint_every",
    "max_rollbacks",
    "tracker",
    "fsdp",
    "data.data_dir",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch",
)
_NO_RESULT: Final = ("data.num_workers", "data.num_threads", "data.prefetch", "model.implementation", "model.remat")


class RunDirectory:
    """Paths and JSON files of a run directory.

    Raises:
        InputError: the path cannot be a folder: it is a URL, a file, below a file, or too long.
    """

    def __init__(self, path: str | Path):
        if "://" in str(path):
            raise InputError(
                f"workdir {path} is a URL, but must be a folder: mount the bucket, and pass the mounted path."
            )
        self.path = values.path("workdir", path).absolute()
        try:
            is_folder = stat.S_ISDIR(self.path.stat().st_mode)
        except FileNotFoundError:
            is_folder = True  # does not exist yet
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{_shown(path)} cannot be a run directory ({reason}); choose another path.") from error
        if not is_folder:
            raise InputError(f"{self.path} is a file; needed: a run directory, or the name of a new one.")
        self._place: tuple[int, int] | None = None
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"

    def claim(self, config: RunConfig, data: DataFacts | None = None) -> None:
        """Claims the directory for a run, unless it holds another run's checkpoints.

        With several processes, which share the file system, the first one writes.

        Args:
            config: the run's config.
            data: facts about its images, for data.json; None if they are not known.

        Raises:
            InputError: it cannot be written, or it holds the checkpoints of a run with another config or other data.
        """
        self.check_same_run(config, data)
        if distributed.is_primary():
            self.describe(config, data)

    def describe(self, config: RunConfig, data: DataFacts | None = None) -> None:
        """Writes environment.json, data.json and, last, config.json, which makes the folder a run directory.

        Raises:
            InputError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("environment.json", environment())
            if data is not None:
                self.write_json("data.json", data)
            self.write_json("config.json", config.to_dict())
        except OSError as error:
            raise self._not_writable(error) from error

    def remember_place(self) -> None:
        """Records the identity of the folder, for `check_in_place`."""
        self._place = _identity(self.path)

    def check_in_place(self) -> None:
        """Raises RunError if the folder was moved, removed or replaced since `remember_place`."""
        if self._place is not None and _identity(self.path) != self._place:
            raise RunError(
                f"the run directory {self.path} was moved or removed during the run, which stops here; start the same "
                "command again, with --workdir set to its present path."
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Prevents other processes from training here until the block, or this process, ends.

        With several processes of one run the first one holds the lock.

        Raises:
            InputError: another process or thread holds it, the directory cannot be made, or the platform has no locks.
        """
        if files.fcntl is None:
            raise InputError(
                "training and convert need file locks (Python's fcntl), which this platform lacks: use Linux, macOS or "
                "WSL. Reading a run and inference work here."
            )
        if not distributed.is_primary():
            yield
            return
        held = contextlib.ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.lock(self.path))
        except BlockingIOError as error:
            raise InputError(
                f"workdir {self.path} is in use by another process or thread; wait for it, or choose another --workdir."
            ) from error
        except OSError as error:
            raise self._not_writable(error) from error
        with held:
            yield

    def has_checkpoints(self, which: str = "*") -> bool:
        """Whether there is a complete checkpoint. Orbax renames a checkpoint to its step number when it is complete.

        Args:
            which: `latest` or `best`; by default any kind.
        """
        return any(path.name.isdigit() for path in self.checkpoints.glob(f"{which}/*"))

    def read_config(self) -> RunConfig:
        """Reads the run's config.

        Raises:
            InputError: this is not a run directory, or its config.json cannot be read.
        """
        file = self.path / "config.json"
        if not file.is_file():
            problem = "is not a run directory: it has no config.json" if self.path.exists() else "does not exist"
            raise InputError(f"{self.path} {problem}; pass a run directory that train.py or convert wrote.")
        try:
            return RunConfig.from_config_dict(_read_object(file))
        except InputError as error:
            raise InputError(f"{file} does not describe a run: {error} Restore it, or choose another run.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file} cannot be read ({error}); restore it, or choose another run.") from error

    def class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the run's classes, in the order of its logits; None if it did not keep them.

        Damaged names are treated as missing, with a warning.
        """
        names = (self.read_json("data.json") or {}).get("class_names")
        if names is None:
            return None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        logger.warning(
            "%s: class_names is not a list of names; it is treated as missing, so that the order of the classes "
            "cannot be checked",
            self.path / "data.json",
        )
        return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file that can be regenerated; returns None if it is missing or, with a warning, damaged."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return _read_object(file)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s cannot be read (%s); it is treated as missing", file, error)
            return None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of its JSON files atomically."""
        files.write_json(self.path / name, content)

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(f"workdir {self.path} cannot be written ({error.strerror}); choose another with --workdir.")

    def check_same_run(self, config: RunConfig, data: DataFacts | None = None) -> None:
        """Checks that the directory holds no checkpoints, or those of this run.

        Raises:
            InputError: it holds checkpoints without a config.json, or of a run with another config or other data.
        """
        if not self.has_checkpoints():
            return
        if not (self.path / "config.json").is_file():
            raise InputError(
                f"workdir {self.path} holds checkpoints but no config.json, so their run is unknown; restore the file, "
                "or choose another --workdir."
            )
        there, here = _meaning(self.read_config()), _meaning(config)
        changed = [key for key in here if key not in FREE_TO_CHANGE and here[key] != there.get(key)]
        if changed:
            raise InputError(
                f"workdir {self.path} holds a run with another config ({describe_changes(changed, there, here)}); "
                "use its settings, or choose another --workdir."
            )
        if data is not None and (kept := self.read_json("data.json")) is not None:
            if changed := _data_changes(kept, data):
                raise InputError(
                    f"the data of the run in {self.path} has changed: {changed}. Steps and labels would mean something "
                    "else: restore the data, or choose another --workdir (with --config.init_from to start from these "
                    "weights)."
                )


def _meaning(config: RunConfig) -> dict[str, Any]:
    """Returns settings by dotted key, with the defaults of the model and of the pruning method filled in.

    This makes two spellings of one run equal: older releases wrote settings that are now defaults.
    """
    content = config.to_dict()
    content["model"] |= dataclasses.asdict(build_sizes(config.model))
    if config.model.is_segmenter:
        sizes = segmenter_sizes(config.model)
        content["model"] |= {name: getattr(sizes, name) for name in ("channels", "aux_channels", "stages")}
    content["pruning"] |= dataclasses.asdict(build_reduction(config.pruning))
    return flatten_dict(content, sep=".")


def changed_settings(there: RunConfig, here: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the settings of the model, the pruning and the data that differ, by dotted key, with both values.

    Settings that change no result are left out: the number of workers, and which implementation runs the scan.
    """
    old, new = _meaning(there), _meaning(here)
    sections, same = ("model.", "pruning.", "data."), set(_NO_RESULT)
    return {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys((*old, *new))
        if key.startswith(sections) and key not in same and old.get(key) != new.get(key)
    }


def _read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises OSError, ValueError or RecursionError."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns the identity (device and inode) of the file at a path; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _shown(path: str | Path) -> str:
    """Returns a path for a message, cut short."""
    text = str(path)
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


def _data_changes(there: DataFacts, here: DataFacts) -> str:
    """Describes the differences between the data of two starts; empty if there are none."""
    found = []
    for split, what in (("train", "to train on"), ("eval", "to evaluate")):
        before = there.get(split)
        before = before.get("images") if isinstance(before, dict) else None
        if before is not None and before != here[split]["images"]:
            found.append(f"{values.counted(before, 'image')} {what} then, {here[split]['images']:,} now")
    names, now = there.get("class_names"), here["class_names"]
    if isinstance(names, list) and names != now:
        found.append(f"{len(names)} classes then, {len(now)} now; {first_difference(names, now)}")
    return "; ".join(found)


def describe_changes(changed: list[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    """Lists the first three of the settings that changed, with both values."""
    first = ", ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in changed[:3])
    return f"{first}{', ...' * (len(changed) > 3)}"
