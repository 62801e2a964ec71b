"""Leases: at most one live holder of a name, on a shared folder or in a bucket, without a coordinator.

    leases/<name>.json      the first claim: who (machine, pid, process start), lease_seconds; its heartbeat
    leases/<name>~1.json    the claim that took it over, and so on: the highest number is the one that counts

A claim creates the next number, which exactly one of many racers can do: on a disk by a hard link of a complete file,
in a bucket by a write on the condition that nothing is there. Nothing is renamed or removed, and only its holder writes
a number again, so a slow racer cannot hit a successor's lease: with one file a name, the racer that read a dead lease
and then replaces it may replace the live one that came after. A released lease says so in its text.

On a disk the heartbeat is the file's time, compared with the time the same disk gives a new file. In a bucket it is a
new text, and who wants to take a lease over must have watched it stay the same for its whole term, by its own clock:
no two clocks are compared, and while the bucket is away nobody's watch goes on, so its return finds every holder alive.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llamax.storage.bucket import ABSENT, Conflict, Missing, StorageError, open_bucket
from llamax.storage.files import beside, write_atomic
from llamax.storage.identity import alive, me
from llamax.storage.places import address_of

LEASE_SECONDS = 60.0


class LeaseLost(BaseException):
    """Another process holds the name now: stop, save nothing. Not an Exception, so that no handler records it."""


class Entry(NamedTuple):
    """The newest claim of a name: `stamp` is when it last beat by the clock of disk or bucket, `version` its text's."""

    number: int
    record: dict[str, Any]
    stamp: float
    version: str


@dataclass(frozen=True)
class Holder:
    """The lease that counts for a name: its number, its text, and whether it keeps the name."""

    number: int
    record: dict[str, Any]
    held: bool


@dataclass
class Lease:
    """A held name. As a context manager it beats in a thread every `lease_seconds / 6` and is released at the end."""

    cell: str
    number: int
    record: dict[str, Any]
    records: FolderRecords | BucketRecords
    lease_seconds: float
    lost: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """Where the lease is, or is seen, on the disk."""
        return self.records.folder / _name(self.cell, self.number)

    def check(self) -> None:
        """Raises LeaseLost if another process took the name over. Of a bucket's lease the last heartbeat tells."""
        if self.lost.is_set() or (self.records.near and self.taken()):
            self.lost.set()
            raise LeaseLost(self.cell)

    def taken(self) -> bool:
        """Whether a successor's lease is there. Raises UserError if the bucket does not answer."""
        return self.records.exists(self.cell, self.number + 1)

    def beat(self) -> bool:
        """One heartbeat: renews the lease's time. False if the lease is lost."""
        if self.taken():
            self.lost.set()
            return False
        self.records.beat(self.cell, self.number, self.record)
        return True

    def release(self) -> None:
        """Gives the name back: the next claim need not wait for expiry. Harmless after a loss."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, StorageError):
            self.records.end(self.cell, self.number)

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
            except StorageError:  # a bucket that is away for the holder lets nobody watch; a successor's lease decides
                continue
            except OSError:  # a full or absent disk: after a whole lease without a beat, others may have the name
                if time.monotonic() - beaten > self.lease_seconds:
                    self.lost.set()
                    return


def claim(folder: Path, name: str, *, lease_seconds: float = LEASE_SECONDS) -> Lease | None:
    """The lease of `name` in a folder of leases if it is free or its holder is dead, else None; of racers one gets it.

    In a bucket, a dead holder of another machine is known after `lease_seconds` of calls that are never further apart
    than half of that.
    """
    records = records_of(folder)
    before = holder(folder, name)
    if before is not None and before.held:
        return None
    number = 0 if before is None else before.number + 1
    record = {"cell": name, **me(), "lease_seconds": lease_seconds, "claimed": time.time(), "id": os.urandom(8).hex()}
    if not records.create(name, number, record):
        return None
    return Lease(name, number, record, records, lease_seconds)


def holder(folder: Path, name: str, now: float | None = None) -> Holder | None:
    """The newest lease of a name, or None if it was never claimed.

    A released lease is free. On the holder's own machine its process decides, so a laptop that slept keeps its leases,
    and a dead worker's are free at once; elsewhere the heartbeat, by its age at `now` (see `shared_now`).
    """
    records = records_of(folder)
    entry = records.newest(name)
    if entry is None:
        return None
    record = entry.record
    held = False if record.get("released") or records.ended(name, entry.number) else alive(record)
    if held is None:
        term = float(record.get("lease_seconds", LEASE_SECONDS))
        held = now - entry.stamp < term if now is not None else records.beats(name, entry, term)
    return Holder(entry.number, record, held)


def shared_now(folder: Path) -> float:
    """The clock that stamps leases in the folder, so that machines whose clocks differ agree on a heartbeat's age."""
    return records_of(folder).now()


def records_of(folder: Path) -> FolderRecords | BucketRecords:
    """The leases in a folder of a disk, or in the bucket that a folder of the cache stands for."""
    where = address_of(folder)
    return FolderRecords(folder) if where is None else _in_bucket(folder, where, os.getpid())


@functools.lru_cache(maxsize=64)
def _in_bucket(folder: Path, where: str, pid: int) -> BucketRecords:
    """One a process: it remembers what it has watched."""
    return BucketRecords(folder, where)


def _name(name: str, number: int) -> str:
    return f"{name}.json" if number == 0 else f"{name}~{number}.json"


# ---------------------------------------------------------------- on a disk
@dataclass(frozen=True)
class FolderRecords:
    """Leases as files."""

    folder: Path
    near = True  # looking costs next to nothing

    def newest(self, name: str) -> Entry | None:
        number = -1
        while self.exists(name, number + 1):
            number += 1
        if number < 0:
            return None
        path = self.folder / _name(name, number)
        stamp = path.stat().st_mtime
        try:
            return Entry(number, json.loads(path.read_text(encoding="utf-8")), stamp, "")
        except (OSError, ValueError):
            return Entry(number, {}, stamp, "")

    def exists(self, name: str, number: int) -> bool:
        return (self.folder / _name(name, number)).exists()

    def create(self, name: str, number: int, record: dict[str, Any]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        return _create(self.folder / _name(name, number), json.dumps(record))

    def beat(self, name: str, number: int, record: dict[str, Any]) -> None:
        os.utime(self.folder / _name(name, number))

    def end(self, name: str, number: int) -> None:
        write_atomic(self.folder / _name(name, number), json.dumps({"cell": name, "released": True}), durable=False)

    def ended(self, name: str, number: int) -> bool:
        return False

    def beats(self, name: str, entry: Entry, term: float) -> bool:
        return self.now() - entry.stamp < term

    def now(self) -> float:
        probe = beside(self.folder / "now")
        try:
            probe.write_bytes(b"")
            os.utime(probe)
            stamp = probe.stat().st_mtime
            probe.unlink()
            return stamp
        except OSError:
            return time.time()


def _create(path: Path, text: str) -> bool:
    """A new file with its whole text, or False if it exists. Hard link where the file system has them."""
    temporary = beside(path)
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


# ---------------------------------------------------------------- in a bucket
class BucketRecords:
    """Leases as objects, and what this process has watched of each."""

    near = False

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self._where = folder, where
        self._bucket, self._prefix = open_bucket(where)
        self._at_once, _ = open_bucket(where, 0.0)  # a heartbeat is tried again by the next one
        self._ended: set[tuple[str, int]] = set()
        self._watched: dict[str, tuple[tuple[int, str], float, float]] = {}  # (what), since when, last look

    def newest(self, name: str) -> Entry | None:
        mine = re.compile(re.escape(f"{self._prefix}/{name}") + r"(?:~(\d+))?\.json")
        found = [(int(match[1] or 0), item) for item in self._list(name) if (match := mine.fullmatch(item.key))]
        if not found:
            return None
        number, item = max(found, key=lambda pair: pair[0])
        try:
            text, version = self._bucket.read(item.key)
            record = json.loads(text)
        except (Missing, ValueError):
            return Entry(number, {}, item.modified, item.version)
        return Entry(number, record if isinstance(record, dict) else {}, item.modified, version)

    def _list(self, name: str) -> list[Any]:
        return self._bucket.list(f"{self._prefix}/{name}")

    def exists(self, name: str, number: int) -> bool:
        return self._bucket.stat(self._key(name, number)) is not None

    def create(self, name: str, number: int, record: dict[str, Any]) -> bool:
        try:
            self._bucket.write(self._key(name, number), json.dumps(record).encode(), ABSENT)
            return True
        except Conflict:
            return False
        except StorageError:  # it may have arrived: nobody here has it
            self._ended.add((name, number))
            raise

    def beat(self, name: str, number: int, record: dict[str, Any]) -> None:
        record["beat"] = record.get("beat", 0) + 1  # an ETag is of the text alone
        self._at_once.write(self._key(name, number), json.dumps(record).encode())

    def ended(self, name: str, number: int) -> bool:
        """Whether this process gave the lease back, which the bucket may not know."""
        return (name, number) in self._ended

    def end(self, name: str, number: int) -> None:
        self._ended.add((name, number))
        self._bucket.write(self._key(name, number), json.dumps({"cell": name, "released": True}).encode())

    def beats(self, name: str, entry: Entry, term: float) -> bool:
        """Whether the holder may live: its text has not been watched, without a gap, for a whole term unchanged."""
        now, what = time.monotonic(), (entry.number, entry.version)
        before, since, last = self._watched.get(name, (what, now, now))
        if before != what or now - last > term / 2:
            since = now
        self._watched[name] = (what, since, now)
        return now - since < term

    def now(self) -> float:
        key = f"{self._prefix}/.now-{os.urandom(6).hex()}"
        try:
            self._at_once.write(key, b"")
            item = self._at_once.stat(key)
            self._at_once.delete([key])
            return time.time() if item is None else item.modified
        except StorageError:  # such as without the right to write
            return time.time()

    def _key(self, name: str, number: int) -> str:
        return f"{self._prefix}/{_name(name, number)}"
