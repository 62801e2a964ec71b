"""Leases: at most one live worker a cell, on a shared folder, without a coordinator.

    leases/<cell>.json      the first claim: who (machine, pid, process start), lease_seconds; mtime = heartbeat
    leases/<cell>~1.json    the claim that took it over, and so on: the highest number is the one that counts

A claim is a hard link of a complete temporary file to the next number, which exactly one of many racers can make.
Nothing is renamed or removed, so a slow racer cannot hit a successor's lease: with one file a cell, the racer that read
a dead lease and then renames that path may rename the live one that replaced it. A released lease says so in its text.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamax.sweep.process import alive, me
from llamax.train.files import write_atomic

LEASE_SECONDS = 60.0


class LeaseLost(BaseException):
    """Another worker holds the cell now: stop, save nothing. Not an Exception, so that no handler records it."""


@dataclass
class Lease:
    """A held cell. As a context manager it beats in a thread every `lease_seconds / 6` and is released at the end."""

    cell: str
    path: Path
    successor: Path
    lease_seconds: float
    lost: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def check(self) -> None:
        """Raises LeaseLost if another worker took the cell over."""
        if self.lost.is_set() or self.successor.exists():
            self.lost.set()
            raise LeaseLost(self.cell)

    def beat(self) -> bool:
        """One heartbeat: renews the lease's time. False if the lease is lost."""
        if self.successor.exists():
            self.lost.set()
            return False
        os.utime(self.path)
        return True

    def release(self) -> None:
        """Gives the cell back: the next claim need not wait for expiry. Harmless after a loss."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            write_atomic(self.path, json.dumps({"cell": self.cell, "released": True}))

    def __enter__(self) -> Lease:
        self._thread = threading.Thread(target=self._keep, name=f"lease-{self.cell}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _keep(self) -> None:
        beaten = time.monotonic()
        while not self._stop.wait(self.lease_seconds / 6):
            try:
                if not self.beat():
                    return
                beaten = time.monotonic()
            except OSError:  # a full or absent disk: after a whole lease without a beat, others may have the cell
                if time.monotonic() - beaten > self.lease_seconds:
                    self.lost.set()
                    return


@dataclass(frozen=True)
class Holder:
    """The lease that counts for a cell: its number, its text, and whether it keeps the cell."""

    number: int
    record: dict[str, Any]
    held: bool


def claim(study: Path, cell: str, *, lease_seconds: float = LEASE_SECONDS) -> Lease | None:
    """The cell's lease if it is free or its holder is dead, else None. Exactly one of many racers gets it."""
    folder = study / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    before = holder(study, cell)
    if before is not None and before.held:
        return None
    number = 0 if before is None else before.number + 1
    record = {"cell": cell, **me(), "lease_seconds": lease_seconds, "claimed": time.time()}
    if not _create(_path(folder, cell, number), json.dumps(record)):
        return None
    return Lease(cell, _path(folder, cell, number), _path(folder, cell, number + 1), lease_seconds)


def holder(study: Path, cell: str, now: float | None = None) -> Holder | None:
    """The newest lease of a cell, or None if it was never claimed. `now`: see `shared_now`."""
    folder = study / "leases"
    number = -1
    while _path(folder, cell, number + 1).exists():
        number += 1
    if number < 0:
        return None
    path = _path(folder, cell, number)
    try:
        beat = path.stat().st_mtime
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record, beat = {}, path.stat().st_mtime
    return Holder(number, record, _held(record, beat, study, now))


def _held(record: dict[str, Any], beat: float, study: Path, now: float | None) -> bool:
    """A released lease is free. On the holder's own machine its process decides, elsewhere the heartbeat.

    So a laptop that slept keeps its leases, and a dead worker's are free at once.
    """
    if record.get("released"):
        return False
    runs = alive(record)
    if runs is not None:
        return runs
    clock = shared_now(study) if now is None else now
    return clock - beat < float(record.get("lease_seconds", LEASE_SECONDS))


def shared_now(study: Path) -> float:
    """The clock that stamps files in the study, so that machines whose clocks differ agree on a heartbeat's age."""
    probe = study / "leases" / f".now-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.write_bytes(b"")
        os.utime(probe)
        stamp = probe.stat().st_mtime
        probe.unlink()
        return stamp
    except OSError:
        return time.time()


def _path(folder: Path, cell: str, number: int) -> Path:
    return folder / (f"{cell}.json" if number == 0 else f"{cell}~{number}.json")


def _create(path: Path, text: str) -> bool:
    """A new file with its whole text, or False if it exists. Hard link where the file system has them."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here (exFAT, some network mounts)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return True
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
