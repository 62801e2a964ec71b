"""SIGTERM and Ctrl-C as a request that the training loop reads between dispatches."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked a run to stop, and it stopped after a complete checkpoint of `step`."""

    def __init__(self, received: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {received.name} at step {step}, which is saved")
        self.received, self.step = received, step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells and schedulers expect."""
        return 128 + self.received


class Signals:
    """`with Signals() as signals:` puts the first SIGTERM or SIGINT in `signals.received`; the second raises at once.

    The second raises KeyboardInterrupt. The previous handlers come back at the end. Outside the main thread, where
    Python allows no handlers, nothing is received.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} after {self.received.name}")
        self.received = signal.Signals(number)
