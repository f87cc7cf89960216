"""The folder of one run: its files, and which run owns it.

config.json        the run's config; a run with another config is refused
environment.json   versions, devices and git revision of the last start
metrics.jsonl      reported numbers, one line per report
tensorboard/       the same numbers for TensorBoard
checkpoints/       latest/, best/, teacher/ and damaged/ (`top_jax.training.checkpoints`)
summary.json       the result of a finished run
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from top_jax import distributed, files
from top_jax.build import build_reduction, build_sizes
from top_jax.config import RunConfig
from top_jax.environment import environment
from top_jax.errors import InputError

# Settings that may change when a run is resumed. They change none of its numbers, except that fsdp, like the number of
# devices, changes the order of sums.
FREE_TO_CHANGE: Final = (
    "log_every",
    "checkpoint_every",
    "max_rollbacks",
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
        InputError: the path is a URL.
    """

    def __init__(self, path: str | Path):
        if "://" in str(path):
            raise InputError(
                f"workdir {path} is a URL, but must be a folder: mount the bucket, and pass the mounted path."
            )
        self.path = Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"

    def claim(self, config: RunConfig) -> None:
        """Makes the directory this run's own, unless another run has checkpoints here.

        With several processes, which share the file system, the first one writes.

        Raises:
            InputError: it cannot be written, or it holds the checkpoints of a run with another config.
        """
        self.check_same_run(config)
        if not distributed.is_primary():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", config.to_dict())
            self.write_json("environment.json", environment())
        except OSError as error:
            raise self._not_writable(error) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Prevents other processes from training here until the block, or this process, ends.

        With several processes of one run the first one holds the lock.

        Raises:
            InputError: another process holds it, or the directory cannot be made.
        """
        if not distributed.is_primary():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise self._not_writable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"workdir {self.path} is in use by another process; wait for it, or choose another --workdir."
                ) from error
            except OSError:
                pass  # a file system without locks
            yield

    def has_checkpoints(self, which: str = "*") -> bool:
        """Whether there is a complete checkpoint: Orbax names it by its number when it is complete.

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
            raise InputError(
                f"{self.path} is not a run directory: it has no config.json. Pass one that train.py or convert wrote."
            )
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({error}); restore it, or choose another run.") from error
        return RunConfig.from_config_dict(content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads one of its JSON files; None if it does not exist."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of its JSON files atomically."""
        files.write_json(self.path / name, content)

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(f"workdir {self.path} cannot be written ({error.strerror}); choose another with --workdir.")

    def check_same_run(self, config: RunConfig) -> None:
        """Checks that the directory is empty of checkpoints, or holds those of this run.

        Raises:
            InputError: it holds checkpoints without a config.json, or of a run with another config.
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


def _meaning(config: RunConfig) -> dict[str, Any]:
    """Returns settings by dotted key, with the defaults of the model and of the pruning method filled in.

    So two spellings of one run are equal: older releases wrote out what is now a default.
    """
    content = config.to_dict()
    content["model"] |= dataclasses.asdict(build_sizes(config.model))
    content["pruning"] |= dataclasses.asdict(build_reduction(config.pruning))
    return flatten(content)


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


def describe_changes(changed: list[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    """Lists the first three of the settings that changed, with both values."""
    first = ", ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in changed[:3])
    return f"{first}{', ...' * (len(changed) > 3)}"


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as a flat one with dotted keys."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
