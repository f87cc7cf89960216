"""Handles SIGTERM and Ctrl-C as requests to stop after the current step."""

from __future__ import annotations

import collections
import signal
import threading
from types import FrameType
from typing import Any

import jax

from top_jax import distributed


class Interruption:
    """Turns the first SIGTERM or SIGINT into a request (`requested`); passes a later SIGINT to the previous handler.

    The previous handler raises KeyboardInterrupt, unless a command has installed its own (`top_jax.cli.runner`).

    A context manager. Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the signal's name
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and callable(previous := self._previous[number]):
            previous(number, frame)
        self.requested = signal.Signals(number).name


class Agreement:
    """Decides whether to stop: all processes stop after the same step, even if a signal reaches only one of them."""

    def __init__(self, signals: Interruption):
        self._signals = signals
        self._answers: collections.deque[Any] = collections.deque()

    def decide(self) -> bool:
        """Returns whether to stop; every process calls it after every step.

        With several processes it returns the answer to the previous call, which has already arrived, so that the
        devices need not wait.
        """
        requested = self._signals.requested is not None
        if jax.process_count() == 1:
            return requested
        self._answers.append(distributed.any_process(requested))
        return len(self._answers) > 1 and bool(self._answers.popleft())
