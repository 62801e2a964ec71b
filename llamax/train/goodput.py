"""Where the time of a run went, in seconds by kind, over all its sessions: its goodput is the share of `step`.

    start        data, mesh, weights: before the first step        compile      of the step
    step         training                                          data         in which the device may have waited
    checkpoint   in which the loop stood still to save             evaluation   held-out loss
    restart      what a session did again: starting, restoring, and all that a kill took back to the last checkpoint
    idle         between two sessions, when no process trained

At every moment one kind runs, so that the kinds add up to the clock. `time.json` has them as of the last sign of life
of a run, a checkpoint has them as of its step, and what lies between the two is what a kill cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

KINDS = ("start", "compile", "step", "data", "checkpoint", "evaluation", "restart", "idle")
Seconds = dict[str, float]


class Spent:
    """The account of one session, on top of `before`: what earlier ones spent (see `carried`)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._since, self._kind = clock, clock(), "start"
        self._seconds = dict.fromkeys(KINDS, 0.0)

    def resume(self, before: Mapping[str, float]) -> None:
        """This session goes on with a run that spent `before`: what it did so far was to restart."""
        self.now("restart")
        self._seconds["restart"] += self._seconds["start"]
        self._seconds["start"] = 0.0
        for kind in KINDS:
            self._seconds[kind] += before.get(kind, 0.0)

    def now(self, kind: str) -> None:
        """From now on the time is of this kind."""
        at = self._clock()
        self._seconds[self._kind] += at - self._since
        self._since, self._kind = at, kind

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """The time of a block is of this kind."""
        outside = self._kind
        self.now(kind)
        try:
            yield
        finally:
            self.now(outside)

    def take(self, kind: str, seconds: float) -> None:
        """The last `seconds` turn out to be of this kind."""
        self._seconds[self._kind] -= seconds
        self._seconds[kind] += seconds

    def seconds(self) -> Seconds:
        """Seconds by kind, until now."""
        self.now(self._kind)
        return dict(self._seconds)


def carried(saved: Mapping[str, float], last: Mapping[str, Any] | None, now: float) -> Seconds:
    """What a session that begins at `now` (seconds since 1970) inherits.

    `saved` is the account in the checkpoint it restored ({}: it begins at step 0), `last` the content of time.json.
    What was spent after the checkpoint was lost, but for idle time, which goes on until now.
    """
    found = {kind: saved.get(kind, 0.0) for kind in KINDS}
    if last is None:
        return found
    until = last["seconds"]
    found["restart"] += max(0.0, busy(until) - busy(saved))
    found["idle"] = until.get("idle", 0.0) + max(0.0, now - last["time"])
    return found


def total(accounts: Iterable[Mapping[str, float]]) -> Seconds:
    """The sum of accounts by kind; {} of none."""
    found: Seconds = {}
    for account in accounts:
        for kind, seconds in account.items():
            found[kind] = found.get(kind, 0.0) + seconds
    return found


def busy(seconds: Mapping[str, float]) -> float:
    """The seconds in which a process was there."""
    return sum((value for kind, value in seconds.items() if kind != "idle"), 0.0)


def shares(seconds: Mapping[str, float], least: float = 0.005) -> str:
    """In words, largest first: `93 % step, 5 % compile, 2 % data`; kinds under `least` of the whole are left out."""
    whole = sum(seconds.values())
    parts = sorted(((value / whole, kind) for kind, value in seconds.items()), reverse=True) if whole > 0 else []
    return ", ".join(f"{share:.0%} {kind}" for share, kind in parts if share >= least).replace("%", " %")
