"""SIGTERM and Ctrl-C as a request the training loop reads between dispatches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """`signal` is null until a stop is asked for, then its name: "SIGTERM" or "SIGINT"."""

    signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """`with stop_signals() as stop:` makes the first SIGTERM or SIGINT set `stop`; the second raises KeyboardInterrupt.

    The previous handlers come back at the end. Outside the main thread, where Python allows no handlers, `stop` stays
    unset.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} a second time")
        stop.signal = signal.Signals(number).name

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
