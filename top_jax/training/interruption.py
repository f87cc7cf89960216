"""SIGTERM and Ctrl-C as a request, not an end."""

from __future__ import annotations

import collections
import signal
import threading
from types import FrameType
from typing import Any

import jax

from top_jax import distributed


class Interruption:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second SIGINT interrupts as usual.

    Outside the main thread, where Python allows no handlers, it does nothing.
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
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class Agreement:
    """Whether to stop, decided by all processes after the same step, though a signal may reach only one of them."""

    def __init__(self, signals: Interruption):
        self._signals = signals
        self._answers: collections.deque[Any] = collections.deque()

    def decide(self) -> bool:
        """To be called after every step by every process; in several, the answer is that of the call before.

        An answer so old is there already: asking costs the devices no pause.
        """
        requested = self._signals.requested is not None
        if jax.process_count() == 1:
            return requested
        self._answers.append(distributed.any_process(requested))
        return len(self._answers) > 1 and bool(self._answers.popleft())
