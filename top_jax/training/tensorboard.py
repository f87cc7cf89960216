"""Writes scalars for TensorBoard straight to disk."""

from __future__ import annotations

import importlib
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from top_jax.optional import needs_extras


class ScalarWriter:
    """Writes one event file.

    tensorboardX's SummaryWriter writes in a thread, with a delay, and stops writing when the disk is full. A killed run
    would lose scalars, and a full disk would block it. So only tensorboardX's records and messages are used.

    Args:
        directory: created if it does not exist; holds one file per start of a run.
        purge_step: TensorBoard ignores the values of earlier files for this step and later ones.
    """

    def __init__(self, directory: Path, *, purge_step: int):
        with needs_extras("training"):
            _import_without_torch("tensorboardX")
        from tensorboardX.record_writer import RecordWriter

        # Protocol buffers create their classes at run time, so a type checker cannot see them.
        messages: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        self._event = messages.Event
        self._summary = summaries.Summary
        directory.mkdir(exist_ok=True)
        started = messages.SessionLog(status=messages.SessionLog.START)
        # TensorBoard reads the files of a run in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{uuid.uuid4().hex[:8]}"  # no second writer takes this name
        self._records = RecordWriter(str(directory / name))
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=started)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Writes scalars by tag; leaves out None."""
        known = {tag: value for tag, value in values.items() if value is not None}
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
        self._write(step=step, summary=self._summary(value=scalars))
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


def _import_without_torch(name: str) -> None:
    """Imports a module, and keeps it from importing PyTorch, which takes seconds and is not needed."""
    if name in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # to `import`, this means "not installed"
    try:
        importlib.import_module(name)
    finally:
        del sys.modules["torch"]
