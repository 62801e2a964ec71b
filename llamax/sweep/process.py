"""What a worker is on its machine: its identity, its cores, its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from llamax.storage.identity import alive, machine, me, started

__all__ = ["alive", "die_with", "machine", "me", "pin", "share", "started"]


# ---------------------------------------------------------------- cores and parent
def share(available: list[int], index: int, workers: int, threads: int | None) -> list[int]:
    """The cores of worker `index` of `workers`: `threads` neighbours (default: an even share), wrapping round."""
    width = min(threads or max(1, len(available) // workers), len(available))
    return sorted(available[(index * width + i) % len(available)] for i in range(width))


def pin(to: list[int]) -> None:
    """Restricts this process to some cores. Before JAX starts: XLA sizes its thread pool by the cores it may use."""
    if to and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, to)


def die_with(parent: int, stop: Callable[[], None], grace_seconds: float = 10.0) -> None:
    """Asks this process to stop when `parent` is gone, even by kill -9, and ends it after `grace_seconds` more.

    On Linux the kernel sends SIGTERM; elsewhere, or if the parent was gone already, `stop` is called. Never both: a
    second signal means "at once" to a training loop.
    """
    armed = sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0) == 0  # PR_SET_PDEATHSIG
    armed = armed and os.getppid() == parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        if not armed:
            stop()
        time.sleep(grace_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
