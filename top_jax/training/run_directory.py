"""The folder of one run: who owns it, and what it says about how it was made.

config.json        the run's config, by which a resumed run is recognised
environment.json   versions, devices and git revision of the last start
metrics.jsonl      one line per report
tensorboard/       the same for TensorBoard
checkpoints/       latest/, best/, teacher/ and damaged/ (`top_jax.training.checkpoints`)
summary.json       the result, once finished
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

# Settings that may differ between a run and its continuation: they do not touch a single number of it, but for the
# order of sums (fsdp, as another number of devices does).
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


class RunDirectory:
    """Paths of a run directory, and its JSON files.

    Raises:
        InputError: the path is a URL.
    """

    def __init__(self, path: str | Path):
        if "://" in str(path):
            raise InputError(f"workdir {path} is a URL; a folder is needed: mount the bucket, and pass where it is.")
        self.path = Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"

    def claim(self, config: RunConfig) -> None:
        """Makes the directory this run's own, or recognises it as this run's from an earlier start.

        Of several processes, which share the file system, the first writes.

        Raises:
            InputError: it cannot be written, or it holds the checkpoints of a run with another config.
        """
        if self.has_checkpoints():
            if not (self.path / "config.json").is_file():
                raise InputError(
                    f"workdir {self.path} holds checkpoints but no config.json to say of which run; restore it, or "
                    "choose another --workdir."
                )
            self._check_same_run(config)
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
        """Keeps other runs from training here too, until the block or the process ends, however it ends.

        Of several processes of one run the first holds the lock.

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

    def has_checkpoints(self) -> bool:
        """Whether anything has been saved here; Orbax gives a checkpoint its number when it is whole."""
        return any(path.name.isdigit() for path in self.checkpoints.glob("*/*"))

    def read_config(self) -> RunConfig:
        """The config of the run that lives here.

        Raises:
            InputError: this is no run directory.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise InputError(
                f"{self.path} is no run directory: it has no config.json. Pass one that train.py or convert made."
            )
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({error}); restore it, or choose another run.") from error
        return RunConfig.from_config_dict(content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """One of its JSON files, or None where there is none (whole files only: see `write_json`)."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of its JSON files, whole or not at all."""
        files.write_json(self.path / name, content)

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(f"workdir {self.path} cannot be written ({error.strerror}); choose another with --workdir.")

    def _check_same_run(self, config: RunConfig) -> None:
        there, here = _meaning(self.read_config()), _meaning(config)
        changed = [key for key in here if key not in FREE_TO_CHANGE and here[key] != there.get(key)]
        if changed:
            raise InputError(
                f"workdir {self.path} holds a run with another config ({told_differences(changed, there, here)}); go "
                "on with the settings there, or choose another --workdir."
            )


def _meaning(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, where one that is not set has the value of the model or of the pruning method.

    So a run goes on however its config is spelled: older releases named what is now left to the model.
    """
    content = config.to_dict()
    content["model"] |= dataclasses.asdict(build_sizes(config.model))
    content["pruning"] |= dataclasses.asdict(build_reduction(config.pruning))
    return flatten(content)


def told_differences(changed: list[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first three of the settings that changed, with both values."""
    told = ", ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in changed[:3])
    return f"{told}{', ...' * (len(changed) > 3)}"


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one, by dotted key."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
