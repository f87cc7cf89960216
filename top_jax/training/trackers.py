"""Trackers: services to which a run reports its metrics, besides metrics.jsonl and TensorBoard (`config.tracker`)."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.optional import optional_package
from top_jax.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A service to which metrics are reported."""

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Reports metrics of the state after `step` steps, by names such as `train/loss`."""
        ...

    def close(self) -> None:
        """Ends the report of this start."""
        ...


class Wandb:
    """Weights & Biases (extra `wandb`): one W&B run per run directory, which later starts continue.

    The project is WANDB_PROJECT, by default `top-jax`; WANDB_MODE=offline writes to the run directory only. After a
    resume or a rollback the steps since the last checkpoint are reported again. Charts have `step` as their axis.

    Raises:
        InputError: the package is missing, or W&B does not start (no login, no network).
    """

    def __init__(self, run: RunDirectory, config: RunConfig):
        wandb = optional_package("wandb", purpose="config.tracker=wandb")
        kept = (run.read_json("wandb.json") or {}).get("id")
        run_id = kept if isinstance(kept, str) else uuid.uuid4().hex[:12]
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "top-jax"),
                name=run.path.name,
                id=run_id,
                resume="allow",
                dir=str(run.path),
                config=config.to_dict(),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"Weights & Biases does not start ({reason}); run `wandb login`, set WANDB_MODE=offline, or drop "
                "--config.tracker."
            ) from error
        run.write_json("wandb.json", {"id": run_id})

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Reports metrics; leaves out None."""
        self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()


_TRACKERS: Final[dict[str, Callable[[RunDirectory, RunConfig], Tracker]]] = {"wandb": Wandb}


class Tracking:
    """The tracker that a config names. One that fails later ends with a warning, never the run."""

    def __init__(self, run: RunDirectory, config: RunConfig):
        assert config.tracker is not None
        self._tracker: Tracker | None = _TRACKERS[config.tracker](run, config)

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Reports metrics as `Tracker.log`."""
        self._try(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Ends the tracker."""
        self._try(lambda tracker: tracker.close())
        self._tracker = None

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning(
                "the tracker failed and is no longer used (%s); metrics.jsonl and TensorBoard continue", reason
            )
