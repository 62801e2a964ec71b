"""Faults of one process at named moments: `arm([{"at": "dispatch", "nth": 3, "do": "kill"}], log)`.

moments  start     before it comes to the others
         restore   before it reads the arrays of a checkpoint
         dispatch  before its nth dispatch: the others are in a collective, or come to one
         save      in its nth checkpoint, while the arrays are written behind the loop
         digest    in the leader's nth, when arrays are on the disk and digests are not
         named     in the leader's nth, when it has its name and what it replaces is still there

acts     kill, term, stop  signals to itself: SIGKILL, SIGTERM, SIGSTOP
         raise             the error that nobody expects
         drop              its connections on the control channel are cut, and it lives
         mute              it sends nothing any more, and its connections stay open
         full              files of more than LIMIT bytes cannot be written until it ends, as on a full disk
         sleep             for `seconds`
         clock             time.time() jumps by `seconds`

What fires is first noted in `log`, with the time (time.monotonic, one clock for all processes of a machine).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fault = Mapping[str, Any]
LIMIT = 16384  # bytes: more than a process says on stderr, less than the arrays of a checkpoint
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


def arm(faults: Sequence[Fault], log: Path) -> None:
    """Put the faults of this process in place, before llamax starts."""
    jobs = _remember_jobs()
    acts: dict[str, Callable[[Fault], None]] = {
        **{name: lambda fault, number=number: os.kill(os.getpid(), number) for name, number in SIGNALS.items()},
        "raise": _fail,
        "drop": lambda fault: [line.socket.shutdown(socket.SHUT_RDWR) for job in jobs for line in job._lines.values()],
        "mute": lambda fault: _mute(),
        "full": lambda fault: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY)),
        "sleep": lambda fault: time.sleep(fault["seconds"]),
        "clock": lambda fault: _shift_clock(fault["seconds"]),
    }
    counts = dict.fromkeys(MOMENTS, 0)

    def reached(moment: str) -> None:
        counts[moment] += 1
        for fault in faults:
            if (fault["at"], fault.get("nth", 1)) == (moment, counts[moment]):
                note(log, fault)
                acts[fault["do"]](fault)

    for moment in {fault["at"] for fault in faults}:
        MOMENTS[moment](lambda moment=moment: reached(moment))


def note(log: Path, fault: Fault) -> None:
    """One line, in one write: several processes share the file."""
    line = json.dumps({**fault, "process": int(os.environ.get("LLAMAX_PROCESS", "0")), "time": time.monotonic()})
    with open(log, "ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


def fired(log: Path) -> list[dict[str, Any]]:
    """What happened, in order."""
    return sorted(map(json.loads, log.read_text().splitlines()), key=lambda one: one["time"]) if log.exists() else []


# ---------------------------------------------------------------- moments
def _at_dispatch(reached: Callable[[], None]) -> None:
    from llamax.train import loop

    compile_dispatch = loop.compile_dispatch

    def compiled(*args: Any) -> Any:
        dispatch = compile_dispatch(*args)

        def watched(*args: Any) -> Any:
            reached()
            return dispatch(*args)

        return watched

    loop.compile_dispatch = compiled


def _before(name: str) -> Callable[[Callable[[], None]], None]:
    """The moment before `llamax.train.checkpoints.NAME` is called."""

    def hook(reached: Callable[[], None]) -> None:
        from llamax.train import checkpoints

        wrapped = getattr(checkpoints, name)

        def watched(*args: Any, **named: Any) -> Any:
            reached()
            return wrapped(*args, **named)

        setattr(checkpoints, name, watched)

    return hook


def _at_save(reached: Callable[[], None]) -> None:
    from llamax.train.checkpoints import Checkpoints

    save = Checkpoints.save

    def watched(self: Checkpoints, *args: Any, **named: Any) -> None:
        save(self, *args, **named)
        reached()

    Checkpoints.save = watched  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "start": lambda reached: reached(),
    "restore": _before("_read"),
    "dispatch": _at_dispatch,
    "save": _at_save,
    "digest": _before("write_digests"),
    "named": _before("sync_folder"),
}


# ---------------------------------------------------------------- acts
def _fail(fault: Fault) -> None:
    raise RuntimeError(f"a fault at {fault['at']} {fault.get('nth', 1)}")


def _mute() -> None:
    from llamax.mesh.channel import Line

    Line.send = lambda self, message: None  # type: ignore[method-assign]


def _shift_clock(seconds: float) -> None:
    now = time.time
    time.time = lambda: now() + seconds


def _remember_jobs() -> list[Any]:
    from llamax.mesh.job import Several

    jobs: list[Any] = []
    start = Several.__init__

    def watched(self: Any, *args: Any) -> None:
        jobs.append(self)
        start(self, *args)

    Several.__init__ = watched  # type: ignore[method-assign]
    return jobs
